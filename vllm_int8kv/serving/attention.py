"""Attention of one layer over the cache: vLLM's calls as calls of `vllm_int8kv.cache.ops`.

`do_kv_cache_update` writes a step's K and V, then `forward` reads the whole context back, prefill included, so an
answer does not depend on how a prompt was chunked or on prefix-cache hits.
"""

from dataclasses import replace

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from vllm_int8kv.cache import ops
from vllm_int8kv.cache.equalization import key_equalizer
from vllm_int8kv.cache.formats import K8V8, SLOT_GROUP
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.config import KV_CACHE_DTYPE, Int8KVConfig
from vllm_int8kv.serving import calibration, prefill, varlen_attention
from vllm_int8kv.serving.metadata import Int8KVMetadata, max_prefill_rows


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
        self.cache_format = K8V8  # until the layer is built and has a name, see `layers.assign_format`
        self.key_transform = KeyTransform(rotate=options.rotate_keys)
        self.cpu_isa = options.cpu_isa
        self.prefill_attention = varlen_attention.find(
            current_platform.device_type,
            self.vllm_config.model_config.dtype,
            head_size,
            alibi=alibi_slopes is not None,
            softcap=bool(logits_soft_cap),
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.update_sinks()

    def update_sinks(self) -> None:
        """Take over the values of the parameter, which has them once weights have been loaded, in the model dtype."""
        if self.sinks_parameter is None:
            return
        if self.sinks is None:
            self.sinks = self.sinks_parameter.detach().float()
        else:  # in place, as CUDA graphs keep its address
            self.sinks.copy_(self.sinks_parameter.detach())

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
            cache_format=self.cache_format,
            key_transform=self.key_transform,
            cpu_isa=self.cpu_isa,
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
            if (calibrating := calibration.running()) is not None:
                return self.calibrate(calibrating, layer, query, key, value, output)
            return output.fill_(0)
        key_transform = self.key_transform
        if layer.kv_sharing_target_layer_name is not None:  # the cache was written by another layer
            owner = get_forward_context().no_compile_layers[layer.kv_sharing_target_layer_name]
            key_transform = owner.impl.key_transform
        options = {
            "softmax_scale": self.scale,
            "cache_format": self.cache_format,
            "key_transform": key_transform,
            "causal": attn_metadata.causal,
            "sliding_window": self.sliding_window,
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
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
                cpu_isa=self.cpu_isa,
                arrivals=attn_metadata.arrivals,
                **options,
            )
        return output

    def calibrate(
        self,
        calibrating: calibration.Pass,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Set the equalizer from Q and K, then attend through a cache, written with it, that lasts for the pass."""
        num_tokens, device = query.shape[0], query.device
        num_blocks = -(-num_tokens // SLOT_GROUP)
        owner = layer.kv_sharing_target_layer_name
        if owner is None:
            self.key_transform = replace(self.key_transform, equalizer=key_equalizer(query, key))
            cache = self.cache_format.allocate(num_blocks, self.num_kv_heads, SLOT_GROUP, self.head_size, device)
            calibrating.caches[layer.layer_name] = cache
            self.do_kv_cache_update(layer, key, value, cache, torch.arange(num_tokens, device=device))
        else:
            cache = calibrating.caches[owner]
        metadata = self.metadata_of_one_sequence(num_tokens, num_blocks, device)
        return self.forward(layer, query, key, value, cache, metadata, output)

    def prefills(self, plan: prefill.PrefillPlan) -> bool:
        """Whether FlashAttention can attend the planned prompts in this layer."""
        if self.prefill_attention is None:
            return False
        counts_from_diagonal = self.sliding_window is not None or self.alibi_slopes is not None
        return not (plan.has_long_sequences and counts_from_diagonal)
