"""What vLLM's workers can be asked for beside their own methods. Nothing here imports vLLM."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM


class WorkerExtension:
    """Part of every worker, see `worker_extension_cls` of vLLM."""

    def attention_backends(self) -> list[str]:
        """The names of the attention backends of all layers of this worker."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return sorted({layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")})


CLASS = f"{WorkerExtension.__module__}.{WorkerExtension.__name__}"
"""The value of `worker_extension_cls`."""


def attention_backends(llm: "LLM") -> list[str]:
    """The names of the attention backends of all layers of an engine that has the extension."""
    return merged(llm.collective_rpc(WorkerExtension.attention_backends.__name__))


def merged(answers: list[list[str]]) -> list[str]:
    """Every name of the workers' answers once."""
    return sorted({name for names in answers for name in names})
