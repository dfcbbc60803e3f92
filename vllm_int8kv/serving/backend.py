"""vLLM's attention backend for `kv_cache_dtype="int8_custom"`: glue between vLLM and `vllm_int8kv.cache.ops`.

vLLM hands over one tensor per layer, `[num_blocks, num_kv_heads, block_size, content_bytes]` int8 with the
bytes of a (block, KV head) pair contiguous (its layout LBHNC); `formats` says what the bytes are.
`do_kv_cache_update` writes a step's K and V, then `forward` reads the whole context back, prefill included,
so an answer does not depend on how a prompt was chunked or on prefix-cache hits.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from vllm_int8kv.cache import formats, ops
from vllm_int8kv.config import KV_CACHE_DTYPE, Int8KVConfig
from vllm_int8kv.serving import calibration, prefill, varlen_attention
from vllm_int8kv.serving.startup_log import log_cache_format

MIN_COMPUTE_CAPABILITY = (7, 5)


class Int8KVBackend(AttentionBackend):
    """Decoder attention over the INT8 cache, on CPU and CUDA."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [KV_CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        return "INT8_KV"

    @staticmethod
    def get_impl_cls() -> type["Int8KVImpl"]:
        return Int8KVImpl

    @staticmethod
    def get_builder_cls() -> type["Int8KVMetadataBuilder"]:
        return Int8KVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(formats.SLOT_GROUP)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(formats.SUPPORTED_HEAD_SIZES)

    @classmethod
    def supported_kv_formatss(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return current_platform.is_cpu()

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return capability is None or capability >= MIN_COMPUTE_CAPABILITY

    @classmethod
    def supports_combination(cls, *args, **kwargs) -> str | None:
        """The reason why this installation cannot serve this platform, or None."""
        if current_platform.is_cuda():
            return None if ops.has_cuda_kernels() else "vllm-int8kv was installed without its CUDA kernels"
        return None if current_platform.is_cpu() else f"platform {current_platform.device_name} not supported"

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Tell vLLM's block manager how many bytes a slot really takes.

        vLLM also asks this of specs that are not ours: of unquantized layers named in
        `kv_cache_dtype_skip_layers` (their spec has the model dtype) and again of its own result.

        Raises:
            ValueError: a layer whose K and V differ in size, or that keeps static sink tokens in its cache.
        """
        if spec.dtype != torch.int8 or spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"kv_cache_dtype={KV_CACHE_DTYPE!r} needs layers with equal K and V head sizes, got head_size "
                f"{spec.head_size} and head_size_v {spec.head_size_v}; use kv_cache_dtype='auto' for this model"
            )
        if isinstance(spec, SinkFullAttentionSpec):
            raise ValueError(
                f"kv_cache_dtype={KV_CACHE_DTYPE!r} does not support static sink tokens, which vLLM writes to the "
                "cache unquantized; use kv_cache_dtype='auto' for this model"
            )
        return replace(spec, state_content_bytes=formats.content_bytes(spec.head_size))


@dataclass
class Int8KVMetadata(AttentionMetadata):
    """What one step's attention needs beside Q and the cache."""

    num_actual_tokens: int
    """Tokens of this step; query and output may have more rows, which are padding."""
    block_table: torch.Tensor
    """[num_seqs, max_blocks_per_seq] int32"""
    seq_lens: torch.Tensor
    """[num_seqs] int32, tokens in the cache including this step's"""
    query_start_loc: torch.Tensor
    """[num_seqs + 1] int32, prefix sum of the query lengths"""
    causal: bool
    prefill_plan: prefill.PrefillPlan | None = None
    """for the sequences that FlashAttention may attend"""


def max_prefill_rows(vllm_config: VllmConfig, sliding_window: int | None) -> int:
    """Rows of the prefill workspace: any step's own tokens, and as much context as a window needs or as is allowed."""
    context = min(vllm_config.model_config.max_model_len, max(prefill.MAX_CONTEXT_ROWS, sliding_window or 0))
    return vllm_config.scheduler_config.max_num_batched_tokens + context


class Int8KVMetadataBuilder(AttentionMetadataBuilder[Int8KVMetadata]):
    """Builds the metadata of a step; one instance per KV cache group and worker."""

    supports_update_block_table: bool = True
    # Any batch could be replayed: the metadata are vLLM's own persistent buffers, the kernels plan from them on the
    # device, and launch shapes follow from numbers of tokens and sequences. Batches of one query length are tested.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        options = Int8KVConfig.from_additional_config(vllm_config.additional_config)
        if device.type == "cpu" and options.cpu_isa is not None:
            ops.set_cpu_isa(options.cpu_isa)
        log_cache_format(kv_cache_spec, vllm_config, options, device)
        # A full-attention group may say that some of its layers have a window; others then see all keys.
        is_sliding = isinstance(kv_cache_spec, SlidingWindowSpec)
        self.sliding_window: int | None = kv_cache_spec.sliding_window if is_sliding else None
        dtype, head_size = vllm_config.model_config.dtype, kv_cache_spec.head_size
        self.plans_prefill = varlen_attention.find(device.type, dtype, head_size) is not None
        if self.plans_prefill:
            self._init_reorder_batch_threshold(prefill.MAX_DECODE_QUERY_LEN, supports_spec_as_decode=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Int8KVMetadata:
        causal = common_attn_metadata.causal
        if isinstance(causal, torch.Tensor):
            raise NotImplementedError(
                f"kv_cache_dtype={KV_CACHE_DTYPE!r} needs a batch that is causal or not as a whole, got a flag per "
                "request; use kv_cache_dtype='auto' for this model"
            )
        return Int8KVMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            block_table=common_attn_metadata.block_table_tensor,
            seq_lens=common_attn_metadata.seq_lens,
            query_start_loc=common_attn_metadata.query_start_loc,
            causal=causal,
            prefill_plan=self.plan_prefill(common_attn_metadata) if self.plans_prefill else None,
        )

    def plan_prefill(self, batch: CommonAttentionMetadata) -> prefill.PrefillPlan | None:
        """How prompts are attended; None without any, or where they do not come after all decodes."""
        query_start_loc = batch.query_start_loc_cpu.tolist()
        while len(query_start_loc) > 1 and query_start_loc[-1] == query_start_loc[-2]:
            query_start_loc.pop()  # a padded batch ends with sequences that have no tokens
        is_prompt = [end - begin > self.reorder_batch_threshold for begin, end in pairwise(query_start_loc)]
        if not any(is_prompt) or not all(is_prompt[is_prompt.index(True) :]):
            return None
        exact = batch.seq_lens_cpu_upper_bound  # for prompts it is
        return prefill.make_plan(
            query_start_loc,
            (batch.seq_lens if exact is None else exact).tolist(),
            num_decodes=is_prompt.index(True),
            sliding_window=self.sliding_window,
            max_rows=max_prefill_rows(self.vllm_config, self.sliding_window),
            device=self.device,
        )

    def update_block_table(
        self, metadata: Int8KVMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Int8KVMetadata:
        return replace(metadata, block_table=blk_table)


class Int8KVImpl(AttentionImpl[Int8KVMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = KV_CACHE_DTYPE,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks_parameter = sinks
        self.sinks: torch.Tensor | None = None
        self.vllm_config = get_current_vllm_config()
        options = Int8KVConfig.from_additional_config(self.vllm_config.additional_config)
        self.rotate_keys = options.rotate_keys
        self.key_equalizer: torch.Tensor | None = None
        self.calibration_state = calibration.new_state(options.equalize_keys)
        self.prefill_attention = varlen_attention.find(
            current_platform.device_type,
            self.vllm_config.model_config.dtype,
            head_size,
            alibi=alibi_slopes is not None,
            softcap=bool(logits_soft_cap),
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        # Only now does the parameter hold the checkpoint's values, in the model dtype.
        if self.sinks_parameter is not None:
            self.sinks = self.sinks_parameter.detach().float()
        calibration.layer_is_loaded(self)

    @staticmethod
    def metadata_of_one_sequence(num_tokens: int, num_blocks: int, device: torch.device) -> Int8KVMetadata:
        """Metadata of a prompt that fills the first blocks of a cache."""
        return Int8KVMetadata(
            num_actual_tokens=num_tokens,
            block_table=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
            query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            causal=True,
        )

    def prefill_workspace(self, num_rows: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values for `prefill.attend`, shared by all layers."""
        shape = (num_rows, self.num_kv_heads, self.head_size)
        if not is_workspace_manager_initialized():
            return query.new_empty(shape), query.new_empty(shape)
        key, value = current_workspace_manager().get_simultaneous((shape, query.dtype), (shape, query.dtype))
        return key, value

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantize and store this step's K and V, `[num_tokens, num_kv_heads, head_size]`."""
        num_tokens = slot_mapping.shape[0]  # later rows are padding
        ops.reshape_and_cache(
            key[:num_tokens],
            value[:num_tokens],
            kv_cache,
            slot_mapping,
            rotate_keys=self.rotate_keys,
            key_equalizer=self.key_equalizer,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Int8KVMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over the cache, which already holds this step's K and V.

        Args:
            query, output: [num_tokens, num_heads, head_size]; rows beyond `num_actual_tokens` are left alone.
            key, value: unused, the cache has them.
            attn_metadata: None while vLLM profiles memory, the output is then zero, and during calibration.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("Int8KVImpl does not quantize its output; disable fuse_attn_quant")
        if attn_metadata is None:
            if self.prefill_attention is not None:  # so that the profile counts it; decode needs a few megabytes
                self.prefill_workspace(max_prefill_rows(self.vllm_config, self.sliding_window), query)
            return calibration.attend(layer, query, key, value, output)
        key_equalizer = self.key_equalizer
        if layer.kv_sharing_target_layer_name is not None:  # the cache was written by another layer
            key_equalizer = (
                get_forward_context().no_compile_layers[layer.kv_sharing_target_layer_name].impl.key_equalizer
            )
        options = {
            "softmax_scale": self.scale,
            "causal": attn_metadata.causal,
            "sliding_window": self.sliding_window,
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
            "rotate_keys": self.rotate_keys,
            "key_equalizer": key_equalizer,
        }
        block_table, seq_lens = attn_metadata.block_table, attn_metadata.seq_lens
        num_seqs, num_tokens = len(seq_lens), attn_metadata.num_actual_tokens
        plan = attn_metadata.prefill_plan
        if plan is not None and self.prefills(plan):
            workspace = self.prefill_workspace(plan.num_rows, query)
            prefill.attend(query, kv_cache, block_table, plan, workspace, self.prefill_attention, out=output, **options)
            num_seqs, num_tokens = plan.num_decodes, plan.num_decode_tokens
        if num_tokens:
            ops.paged_attention(
                query[:num_tokens],
                kv_cache,
                block_table[:num_seqs],
                seq_lens[:num_seqs],
                attn_metadata.query_start_loc[: num_seqs + 1],
                out=output[:num_tokens],
                **options,
            )
        return output

    def prefills(self, plan: prefill.PrefillPlan) -> bool:
        """Whether FlashAttention can attend the planned prompts in this layer."""
        if self.prefill_attention is None:
            return False
        counts_from_diagonal = self.sliding_window is not None or self.alibi_slopes is not None
        return not (plan.has_long_sequences and counts_from_diagonal)
