"""KV connectors beside this cache: which copy its pages whole, and whose pages an engine may read.

A page says nothing of its format, so whatever outlives an engine is kept apart by everything that decides what its
bytes mean: a connector that stores pages in a folder gets a subfolder of that name.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_int8kv.config import Int8KVConfig

LAYOUT_VERSION = 1
"""Raised whenever the same format name stands for other bytes."""
FOLDER_PREFIX = "int8kv-"

V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
EXAMPLE = f"{V1}.example_connector:ExampleConnector"
OFFLOADING = f"{V1}.offloading_connector:OffloadingConnector"
SIMPLE_OFFLOADING = f"{V1}.simple_cpu_offload_connector:SimpleCPUOffloadConnector"
MULTI = f"{V1}.multi_connector:MultiConnector"
TOP = "kv_transfer_config"
STORE = "vllm_int8kv.store.engine.connector:KVStoreConnector"
STORE_MODULES = ("vllm_int8kv.store", STORE.partition(":")[0])
"""Where users find it, and where it is."""
BLOCK_CONNECTORS = (EXAMPLE, OFFLOADING, SIMPLE_OFFLOADING, STORE)
"""Classes that copy whole blocks, or the slots of whole blocks."""
SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")
"""Of vLLM's offloading connector: memory of the engine, and tiers behind it."""
EXAMPLE_FOLDER = "/tmp"
"""Where the example connector stores pages unless it is told otherwise."""


def connector_reasons(vllm_config: Any) -> Iterator[str]:
    """Why the connectors of an engine cannot be used. A MultiConnector is as good as what it combines."""
    if vllm_config.cache_config.kv_offloading_size and vllm_config.cache_config.kv_offloading_backend != "native":
        # vLLM makes a connector of it only after this check.
        yield f"kv_offloading_backend={vllm_config.cache_config.kv_offloading_backend!r}: use 'native'"
    if (given := vllm_config.kv_transfer_config) is None or given.kv_connector is None:
        return
    entries = [(TOP, _as_entry(given))]
    while entries:
        where, entry = entries.pop(0)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("kv_connector"), str):
            yield f'{where}: expected a mapping with the key "kv_connector", got {entry!r}'
            continue
        extra = entry.get("kv_connector_extra_config") or {}
        if not isinstance(extra, Mapping):
            yield f"{where}: kv_connector_extra_config must be a mapping, got {extra!r}"
            continue
        try:
            loaded = _class_of(entry)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            yield f"kv_connector={entry['kv_connector']!r} cannot be loaded: {error}"
            continue
        if loaded == MULTI:
            children = extra.get("connectors", [])
            if not isinstance(children, list):
                yield f'{where}: "connectors" must be a list, got {children!r}'
                continue
            entries += [(f'{where}, "connectors", entry {number}', child) for number, child in enumerate(children)]
        elif loaded not in BLOCK_CONNECTORS:
            known = ", ".join(name.partition(":")[2] for name in BLOCK_CONNECTORS)
            yield (
                f"kv_connector={entry['kv_connector']!r} ({loaded}): the bytes of a slot lie in several planes of its "
                f"block, so a connector that copies single slots would corrupt the cache; known to copy whole blocks: "
                f"{known}"
            )
        elif loaded == STORE and where != TOP:
            yield f"{where}: {STORE.partition(':')[2]} inside of another connector; use it by itself"
        else:
            yield from _reasons_of(loaded, extra, vllm_config)


def is_store(vllm_config: Any) -> bool:
    """Whether an engine's connector is this project's own, which tells pages of other key equalizers apart."""
    config = vllm_config.kv_transfer_config
    if config is None or config.kv_connector != STORE.partition(":")[2]:
        return False
    return config.kv_connector_module_path in STORE_MODULES


def _as_entry(config: Any) -> dict[str, Any]:
    names = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
    return {name: getattr(config, name) for name in names}


def _class_of(entry: Mapping[str, Any]) -> str:
    """`module:name` of the class that vLLM will load for an entry, whatever the entry calls it."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    names = ("kv_connector", "kv_connector_module_path")
    config = KVTransferConfig(kv_role="kv_both", **{name: entry[name] for name in names if name in entry})
    loaded = KVConnectorFactory.get_connector_class(config)
    return f"{loaded.__module__}:{loaded.__qualname__}"


def _reasons_of(loaded: str, extra: Mapping[str, Any], vllm_config: Any) -> Iterator[str]:
    """Why a connector that copies whole blocks cannot be used as it is configured."""
    if loaded == EXAMPLE:
        # vLLM 0.32, with every KV cache dtype: ranks write their heads to the same files, and a prompt that is
        # computed in chunks is saved with its first chunk, when most of its blocks do not exist.
        if (size := vllm_config.parallel_config.tensor_parallel_size) > 1:
            yield f"ExampleConnector with tensor_parallel_size={size}: its ranks overwrite each other's files"
        if vllm_config.scheduler_config.enable_chunked_prefill:
            yield (
                "ExampleConnector with chunked prefill: it saves a prompt with its first chunk; use "
                "enable_chunked_prefill=False"
            )
    if loaded == OFFLOADING and (spec := extra.get("spec_name", SPECS[0])) not in SPECS:
        yield f"OffloadingConnector with spec_name={spec!r}: nothing tells its pages' formats apart; use {SPECS[1]}"
    tiers = extra.get("secondary_tiers", []) if loaded == OFFLOADING else []
    if not isinstance(tiers, list) or not all(isinstance(tier, Mapping) for tier in tiers):
        yield f"OffloadingConnector: secondary_tiers must be a list of mappings, got {tiers!r}"
        return
    for tier in tiers:
        if tier.get("type") != "fs" or "module_path" in tier:
            yield (
                f"OffloadingConnector with the secondary tier {tier.get('type')!r}: what it stores has no name that "
                'tells formats apart; use the tier "fs"'
            )


def separate_folders(vllm_config: Any, layer_formats: Mapping[int, str]) -> None:
    """Give every connector that stores pages in a folder a subfolder for engines whose pages mean the same.

    Args:
        vllm_config: a configuration without `connector_reasons`; its connectors' folders are changed.
        layer_formats: what the layer policy says, by layer index.
    """
    if (config := vllm_config.kv_transfer_config) is None or config.kv_connector is None:
        return
    name = FOLDER_PREFIX + namespace(vllm_config, layer_formats)

    def separate(folder: str) -> str:
        path = Path(folder)
        return folder if re.fullmatch(FOLDER_PREFIX + "[0-9a-f]{16}", path.name) else str(path / name)

    # A copy, as the user may start another engine with the same object.
    separated = copy.copy(config)
    separated.kv_connector_extra_config = _with_folders(_as_entry(config), separate)
    vllm_config.kv_transfer_config = separated


def _with_folders(entry: Mapping[str, Any], separate: Callable[[str], str]) -> dict[str, Any]:
    """The `kv_connector_extra_config` of an entry with its folders replaced."""
    extra, loaded = dict(entry.get("kv_connector_extra_config") or {}), _class_of(entry)
    if loaded == EXAMPLE:
        extra["shared_storage_path"] = separate(extra.get("shared_storage_path", EXAMPLE_FOLDER))
    elif loaded == OFFLOADING and "secondary_tiers" in extra:
        extra["secondary_tiers"] = [
            {**tier, "root_dir": separate(tier["root_dir"])} if "root_dir" in tier else tier
            for tier in extra["secondary_tiers"]
        ]
    elif loaded == MULTI:
        extra["connectors"] = [
            {**child, "kv_connector_extra_config": _with_folders(child, separate)}
            for child in extra.get("connectors", [])
        ]
    return extra


def namespace(vllm_config: Any, layer_formats: Mapping[int, str]) -> str:
    """A name that two engines share only if a page of one means the same to the other.

    Keys are not equalized where there is a connector of vLLM (`calibration`), so that no factors are part of it.
    """
    cache_config, model_config = vllm_config.cache_config, vllm_config.model_config
    options = asdict(Int8KVConfig.from_additional_config(vllm_config.additional_config))
    speculative_config = vllm_config.speculative_config
    fields = {
        "layout": LAYOUT_VERSION,
        "model": [model_config.model, model_config.revision, str(model_config.dtype)],
        "kv_cache_dtype": [cache_config.cache_dtype, getattr(speculative_config, "kv_cache_dtype", None)],
        "block_size": cache_config.block_size,
        "rotate_keys": options["rotate_keys"],
        "format": options["format"],
        "layers": sorted(layer_formats.items()),
        "skipped": sorted(cache_config.kv_cache_dtype_skip_layers),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
