"""Features of vLLM that would not work with this cache: refused at start-up, with the reason and a way out.

What depends on one layer (its head size, MLA, its attention type) is refused by `plugin.refuse_unsupported`; this is
about the engine as a whole. Imports neither vLLM nor the kernels.
"""

from collections.abc import Iterator
from typing import Any

from vllm_int8kv.config import KV_CACHE_DTYPE

BLOCK_CONNECTORS = ("ExampleConnector", "OffloadingConnector", "SimpleCPUOffloadConnector")
"""KV connectors of vLLM that copy whole blocks, or the slots of whole blocks."""

MULTI_CONNECTOR = "MultiConnector"


def refuse_features(vllm_config: Any, *, is_cpu: bool) -> None:
    """Check an engine's configuration, a `VllmConfig`.

    Raises:
        ValueError: names every feature that is not supported, why, and what to use instead.
    """
    reasons = [*_connector_reasons(vllm_config.kv_transfer_config)]
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    if is_cpu and num_stages > 1:
        reasons.append(
            f"pipeline_parallel_size={num_stages}: on CPU the scheduler of vLLM 0.32 loses requests between the stages "
            "(KeyError in update_from_output), with every KV cache dtype; use tensor_parallel_size"
        )
    if reasons:
        raise ValueError(f"kv_cache_dtype={KV_CACHE_DTYPE!r} does not support {'; nor '.join(reasons)}")


def _connector_reasons(kv_transfer_config: Any) -> Iterator[str]:
    """Why connectors cannot be used. A MultiConnector is as good as what it combines."""
    if kv_transfer_config is None or kv_transfer_config.kv_connector is None:
        return
    names = [kv_transfer_config.kv_connector]
    children = [kv_transfer_config.kv_connector_extra_config]
    while children:
        for child in children.pop().get("connectors", []):
            names.append(child["kv_connector"])
            children.append(child.get("kv_connector_extra_config", {}))
    known = ", ".join(BLOCK_CONNECTORS)
    for name in names:
        if name not in (*BLOCK_CONNECTORS, MULTI_CONNECTOR):
            yield (
                f"kv_connector={name!r}: the bytes of a slot lie in four planes of its block, so a connector that "
                f"copies single slots would corrupt the cache; known to copy whole blocks: {known}"
            )
