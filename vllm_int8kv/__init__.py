"""INT8 KV cache for vLLM: `LLM(model, kv_cache_dtype="int8_custom")`."""

from importlib.metadata import version

__version__ = version("vllm-int8kv")


def register() -> None:
    """Entry point of the `vllm.general_plugins` group: vLLM calls it in every process."""
    from vllm_int8kv.serving.plugin import register as register_plugin

    register_plugin()
