"""vLLM's connector to the store: what the scheduler looks up, and what the workers load and save.

Loads are asynchronous: a request waits for its blocks beside the steps of the others. What could not be loaded is
computed, whatever the reason. Whole blocks of prompts and answers are saved after the step that filled them.
"""

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import iter_layer_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_int8kv.store import namespace as names
from vllm_int8kv.store.engine import inputs
from vllm_int8kv.store.engine.contents import Block, Contents, PageContents, Written
from vllm_int8kv.store.engine.gpu_pages import GpuPageContents
from vllm_int8kv.store.engine.lookups import Lookups, allocated_blocks
from vllm_int8kv.store.engine.stats import PromptPace, StorePromMetrics, StoreStats
from vllm_int8kv.store.engine.transfers import Outcome, Transfers
from vllm_int8kv.store.index import Index
from vllm_int8kv.store.options import StoreOptions
from vllm_int8kv.store.pages import paged_layers
from vllm_int8kv.store.registry import make_codec, make_input_codec, needs_metrics, stores_inputs

logger = init_logger("vllm.int8kv")

IDLE_WAIT_SECONDS = 0.02
"""How long a step without a forward pass waits for a load: an idle engine spins, and would starve it."""
IDLE_FILL_SECONDS = 0.1
"""How long such a step fills blocks where it does that itself; meanwhile nobody sees new requests."""
BAD_FILE_SECONDS = 3600.0
"""How long a block whose file was bad is not asked for again; it is written anew when it has been computed."""
OWN_NAMES = ("_name_or_path", "transformers_version")
"""Of a configuration, what says where the model lies and who wrote it."""
LOG_SECONDS = 60.0
"""Between two lines about problems of one kind."""


@dataclass
class StoreMetadata(KVConnectorMetadata):
    """What the workers do in a step."""

    loads: dict[str, list[Block]] = field(default_factory=dict)
    """by request, in the order of its tokens"""
    saves: list[Block] = field(default_factory=list)
    """of all requests"""
    written: dict[int, Written] = field(default_factory=dict)
    """by id, blocks that the step writes to and that may be saved; if inputs are stored"""
    allocated: set[int] = field(default_factory=set)
    """ids of the blocks that requests have got for the step"""
    touches: list[list[str]] = field(default_factory=list)
    """hashes of the blocks of prefixes that were used"""
    num_tokens: int = 0
    """that the step computes, of all requests together"""
    has_prompt: bool = False
    """whether a request computes a whole block or more"""


@dataclass
class StoreWorkerMetadata(KVConnectorWorkerMetadata):
    """What happened to blocks in the workers."""

    saved: dict[str, int] = field(default_factory=dict)
    """by hash, how many ranks have written it"""
    unsaved: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)

    def aggregate(self, other: "StoreWorkerMetadata") -> "StoreWorkerMetadata":
        saved = dict(Counter(self.saved) + Counter(other.saved))
        unsaved, bad = self.unsaved | other.unsaved, self.bad | other.bad
        return StoreWorkerMetadata(saved, unsaved, bad, self.missing | other.missing)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """The namespace of a worker: formats of layers and key equalizers exist only there."""

    namespace: str


class KVStoreConnector(KVConnectorBase_V1):
    """Prefix blocks in a folder. See `vllm_int8kv.store` for how to name it."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = StoreOptions.from_mapping(self._kv_transfer_config.kv_connector_extra_config or {})
        check_engine(vllm_config, kv_cache_config)
        # vLLM's default is to fail a request whose blocks cannot be loaded.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self._block_size = vllm_config.cache_config.block_size
        self._lookups: Lookups | None = None
        self._transfers: Transfers | None = None
        self._namespace = ""
        self._outcome = Outcome()
        self._last_logged = self._step_began = 0.0
        self._pace = PromptPace()
        self._rank = 0

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that was not saved is a later miss."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Blocks outermost, so that a page is one stretch of memory."""
        return "LBHNC"

    # Worker

    @classmethod
    def follow_model(cls, model: torch.nn.Module, vllm_config: VllmConfig) -> None:
        """A model has been loaded and is not yet compiled."""
        if stores_inputs((vllm_config.kv_transfer_config.kv_connector_extra_config or {}).get("codec")):
            inputs.follow_model(model, vllm_config)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        config, options = self._vllm_config, self._options
        num_blocks = self._kv_cache_config.num_blocks
        layers = paged_layers(kv_caches, config.compilation_config.static_forward_context, num_blocks)
        group, model_config = get_tp_group(), config.model_config
        self._rank = group.rank_in_group
        description = {
            "layout": names.LAYOUT_VERSION,
            "model": names.model_identity(
                model_config.model, model_config.revision, config.load_config.load_format, model_config.seed
            ),
            "hf_config": {k: str(v) for k, v in model_config.hf_config.to_dict().items() if k not in OWN_NAMES},
            "dtype": str(model_config.dtype),
            "quantization": model_config.quantization,
            "block_size": self._block_size,
            "codec": options.codec,
            "layers": [layer.describe() for layer in layers],
        }
        if stores_inputs(options.codec):  # the same on all ranks
            input_layers = inputs.input_layers({layer.name for layer in layers}, config)
            description |= {"inputs": [layer.describe() for layer in input_layers], "ranks": group.world_size}
        else:
            description |= {
                "equalizers": [
                    None if layer.key_transform.equalizer is None else layer.key_transform.equalizer.tolist()
                    for layer in layers
                ],
                "rank": [group.rank_in_group, group.world_size],
            }
        self._namespace = names.digest(description)
        if stores_inputs(options.codec):
            metrics = inputs.metrics_of(input_layers, config) if needs_metrics(options.codec) else ()
            contents: Contents = inputs.InputContents(
                make_input_codec(options.codec, input_layers, options.root / self._namespace, metrics),
                config,
                num_blocks=num_blocks,
                page_bytes=sum(layer.page_bytes for layer in layers),
                max_bytes=options.max_queued_bytes,
                saves=group.rank_in_group == 0,
            )
        else:
            if on_gpu := layers[0].pages.is_cuda:
                logger.warning("KV store: blocks of GPUs are copied by code that was tested on a simulated GPU only")
            contents = (GpuPageContents if on_gpu else PageContents)(make_codec(options.codec, layers))
        self._transfers = Transfers(
            options.root,
            self._namespace,
            contents,
            options.codec,
            max_bytes=options.max_bytes,
            max_queued_bytes=options.max_queued_bytes,
        )
        formats = Counter("auto" if layer.cache_format is None else layer.cache_format.name for layer in layers)
        shown = {
            "model": model_config.model,
            "codec": options.codec,
            "formats": ", ".join(f"{count} x {name}" for name, count in formats.items()),
            "block_size": self._block_size,
            "rank": f"{group.rank_in_group} of {group.world_size}",
        }
        with contextlib.suppress(OSError):  # a folder that may only be read serves what it has
            names.write_description(options.root / self._namespace, shown)
        logger.info("KV store: blocks as %s in %s", options.codec, options.root / self._namespace)

    def get_handshake_metadata(self) -> Handshake | None:
        return Handshake(self._namespace)

    def bind_connector_metadata(self, connector_metadata: StoreMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._transfers.contents.begin_step(connector_metadata.written, connector_metadata.allocated)
        self._step_began = time.monotonic()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        for request_id, blocks in metadata.loads.items():
            self._transfers.load(request_id, blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests that wait for their blocks are in no step."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Pages are copied when all layers have been computed."""

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        if metadata.saves and self._transfers.contents.saves:
            self._transfers.save(metadata.saves)
        for hashes in metadata.touches:
            self._transfers.touch(hashes)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._transfers.contents.forget(finished_req_ids)
        metadata = self._get_connector_metadata() if self.has_connector_metadata() else None
        is_idle = metadata is not None and metadata.num_tokens == 0
        if metadata is not None and metadata.has_prompt:
            self._pace.note_step(time.monotonic() - self._step_began, metadata.num_tokens)
        wait_seconds = IDLE_WAIT_SECONDS if is_idle else 0.0
        if self._transfers.contents.is_filled_in_step:
            # A step takes at most twice as long as without.
            self._transfers.fill(IDLE_FILL_SECONDS if is_idle else time.monotonic() - self._step_began, wait_seconds)
            wait_seconds = 0.0
        self._outcome = self._transfers.take_outcome(wait_seconds)
        if self._rank == 0:  # all ranks load, and what they count is added up
            num_blocks = self._outcome.counts.get("loaded_blocks", 0)
            if spared := self._pace.seconds_for(int(num_blocks) * self._block_size):
                self._outcome.count("spared_seconds", spared)
        self._log_problems()
        return None, self._outcome.finished_loads or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._outcome.failed_blocks

    def build_connector_worker_meta(self) -> StoreWorkerMetadata | None:
        outcome = self._outcome
        saved = dict.fromkeys(outcome.saved, 1)
        if not (saved or outcome.unsaved or outcome.bad_hashes or outcome.missing_hashes):
            return None
        return StoreWorkerMetadata(saved, outcome.unsaved, outcome.bad_hashes, outcome.missing_hashes)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return StoreStats(self._outcome.counts) if self._outcome.counts else None

    def shutdown(self) -> None:
        if self._transfers is not None:
            self._transfers.finish()

    def _log_problems(self) -> None:
        problems = self._outcome.problems
        if problems and time.monotonic() - self._last_logged > LOG_SECONDS:
            self._last_logged = time.monotonic()
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            logger.warning("KV store: %s%s", problems[0], more)

    # Scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Handshake]) -> None:
        found = sorted({handshake.namespace for handshake in metadata.values()})
        self._lookups = Lookups(Index(self._options.root, found), self._block_size, num_ranks=len(found))

    def on_new_request(self, request: Any) -> None:
        if self._lookups is not None:
            self._lookups.add_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._lookups is None:
            return 0, False
        num_tokens = self._lookups.num_stored_tokens(request, num_computed_tokens)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._lookups is not None and num_external_tokens:
            self._lookups.load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StoreMetadata:
        if self._lookups is None:
            return StoreMetadata()
        lookups = self._lookups
        written = lookups.find_written(scheduler_output) if stores_inputs(self._options.codec) else {}
        return StoreMetadata(
            loads=lookups.take_loads(),
            saves=lookups.find_saves(scheduler_output),
            written=written,
            allocated=allocated_blocks(scheduler_output),
            touches=lookups.take_touches(),
            num_tokens=scheduler_output.total_num_scheduled_tokens,
            has_prompt=max(scheduler_output.num_scheduled_tokens.values(), default=0) >= self._block_size,
        )

    def update_connector_output(self, connector_output: Any) -> None:
        if (found := connector_output.kv_connector_worker_meta) is not None and self._lookups is not None:
            self._lookups.note(found.saved, found.unsaved)
            for block in found.bad:
                self._lookups.index.forget(block, BAD_FILE_SECONDS)
            for block in found.missing:
                self._lookups.index.forget(block)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._lookups is not None:
            self._lookups.remove_request(request.request_id)
        return False, None

    def weights_changed(self) -> None:
        """Neither load nor save any more: the namespace stands for the weights that the engine started with."""
        if self._lookups is not None:
            logger.warning("KV store: not used any more by this engine, as its weights have changed")
            self._lookups = None

    # Front end

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return StoreStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> StorePromMetrics:
        return StorePromMetrics(*args)


def check_engine(vllm_config: VllmConfig, kv_cache_config: Any) -> None:
    """Refuse engines whose blocks the store cannot keep.

    Raises:
        ValueError: names the option.
    """
    reasons = []
    if not vllm_config.cache_config.enable_prefix_caching:
        reasons.append("enable_prefix_caching=False: blocks are found as the prefix cache finds them")
    parallel_config = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel_config, name, 1)) > 1:
            reasons.append(f"{name}={size}")
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        reasons.append(f"{current_platform.device_name}: pages are copied on CPUs and CUDA GPUs only")
    if getattr(vllm_config.model_config, "model_weights", ""):
        reasons.append("weights in an object storage: nothing tells them from others of the same name")
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)]
    if len(kv_cache_config.kv_cache_groups) != 1 or not all(isinstance(spec, FullAttentionSpec) for spec in specs):
        kinds = ", ".join(sorted({type(spec).__name__ for spec in specs}))
        reasons.append(f"layers of this model ({kinds}): blocks are kept of layers that see all tokens")
    if reasons:
        raise ValueError(f"KVStoreConnector cannot be used with {'; '.join(reasons)}")
