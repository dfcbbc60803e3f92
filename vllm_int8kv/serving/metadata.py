"""What one step's attention needs beside Q and the cache, and how it is made from vLLM's batch."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from vllm_int8kv.cache import ops
from vllm_int8kv.cache.formats import SLOT_GROUP
from vllm_int8kv.config import KV_CACHE_DTYPE, Int8KVConfig
from vllm_int8kv.serving import prefill, varlen_attention
from vllm_int8kv.serving.layers import check_shared_caches
from vllm_int8kv.serving.start_up.log import log_cache_format


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
    arrivals: torch.Tensor | None = None
    """for the kernels of a GPU, see `ops.prepare_paged_attention`"""
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
        check_shared_caches(vllm_config.compilation_config.static_forward_context)
        log_cache_format(kv_cache_spec, vllm_config, options, device)
        # A full-attention group may say that some of its layers have a window; others then see all keys.
        is_sliding = isinstance(kv_cache_spec, SlidingWindowSpec)
        self.sliding_window: int | None = kv_cache_spec.sliding_window if is_sliding else None
        dtype, head_size = vllm_config.model_config.dtype, kv_cache_spec.head_size
        # Of this builder alone: vLLM makes one per micro-batch, and those may run at the same time.
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        self.arrivals = ops.prepare_paged_attention(
            torch.empty(0, impl.num_heads, head_size, dtype=dtype, device=device),
            impl.cache_format.allocate(0, impl.num_kv_heads, SLOT_GROUP, head_size, device),
            cache_format=impl.cache_format,
        )
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
            arrivals=self.arrivals,
            prefill_plan=self.plan_prefill(common_attn_metadata) if self.plans_prefill else None,
        )

    def plan_prefill(self, batch: CommonAttentionMetadata) -> prefill.PrefillPlan | None:
        """How prompts are attended; None without any, where they do not come after all decodes, and where only the
        device knows the lengths: to wait for it would stall every step, and is an error in the capture of a graph."""
        seq_lens = batch.seq_lens_cpu_upper_bound  # of prompts it is the length
        if seq_lens is None:
            return None
        query_start_loc = batch.query_start_loc_cpu.tolist()
        while len(query_start_loc) > 1 and query_start_loc[-1] == query_start_loc[-2]:
            query_start_loc.pop()  # a padded batch ends with sequences that have no tokens
        is_prompt = [end - begin > self.reorder_batch_threshold for begin, end in pairwise(query_start_loc)]
        if not any(is_prompt) or not all(is_prompt[is_prompt.index(True) :]):
            return None
        return prefill.make_plan(
            query_start_loc,
            seq_lens.tolist(),
            num_decodes=is_prompt.index(True),
            sliding_window=self.sliding_window,
            max_rows=max_prefill_rows(self.vllm_config, self.sliding_window),
            device=self.device,
        )

    def update_block_table(
        self, metadata: Int8KVMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Int8KVMetadata:
        return replace(metadata, block_table=blk_table)
