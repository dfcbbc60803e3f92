"""A store of KV blocks in a folder: prompts that were computed once are loaded, by any engine, after any restart.

LLM(model, kv_cache_dtype="int8_custom", kv_transfer_config={
    "kv_connector": "KVStoreConnector",
    "kv_connector_module_path": "vllm_int8kv.store",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"path": "/var/cache/kv", "max_bytes": 50_000_000_000, "codec": "exact"},
})
"""

from typing import Any


def transfer_config(options: dict[str, Any]) -> dict[str, Any]:
    """`kv_transfer_config` of an engine with the store.

    Args:
        options: `kv_connector_extra_config`, see `options.StoreOptions`; not checked here.
    """
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
    }


def __getattr__(name: str) -> Any:
    """The connector, which imports vLLM; the files and codecs work without it."""
    if name == "KVStoreConnector":
        from vllm_int8kv.store.engine.connector import KVStoreConnector

        return KVStoreConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
