"""Tiny random models of real architectures, written as Hugging Face folders without a tokenizer.

Random weights make near-ties, so tests compare their log-probabilities, not their greedy tokens. The weights are
drawn wider than transformers does: otherwise attention is nearly uniform and a broken cache would go unnoticed.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCAB_SIZE = 256
SLIDING_WINDOW = 24
"""Shorter than the tests' prompts and no multiple of a block size, so that a wrong mask shows."""

_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=128,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    tie_word_embeddings=False,
)


def llama(folder: Path, *, num_heads: int = 6, num_kv_heads: int = 2, head_size: int = 64) -> Path:
    """Full attention; three queries per KV head unless told otherwise."""
    config = LlamaConfig(
        **_COMMON,
        num_hidden_layers=3,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
    )
    return _write(LlamaForCausalLM, config, folder)


def multi_head(folder: Path) -> Path:
    """One query per KV head (GQA 1)."""
    return llama(folder, num_heads=4, num_kv_heads=4)


def multi_query(folder: Path) -> Path:
    """One KV head for all queries, and a head size that is no power of two."""
    return llama(folder, num_heads=4, num_kv_heads=1, head_size=96)


def unsupported_head_size(folder: Path) -> Path:
    return llama(folder, num_heads=4, num_kv_heads=2, head_size=40)


def mistral(folder: Path) -> Path:
    """A sliding window in every layer."""
    config = MistralConfig(
        **_COMMON,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=SLIDING_WINDOW,
    )
    return _write(MistralForCausalLM, config, folder)


def gemma2(folder: Path) -> Path:
    """Sliding and full layers in turn, and soft-capped scores."""
    config = Gemma2Config(
        **_COMMON | {"tie_word_embeddings": True},
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=SLIDING_WINDOW,
        attn_logit_softcapping=5.0,
    )
    return _write(Gemma2ForCausalLM, config, folder)


def gemma3(folder: Path) -> Path:
    """Two sliding layers for each full one, Q and K normalized, one KV head."""
    config = Gemma3TextConfig(
        **_COMMON | {"tie_word_embeddings": True},
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=80,
        query_pre_attn_scalar=80,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    return _write(Gemma3ForCausalLM, config, folder)


def gpt_oss(folder: Path) -> Path:
    """Attention sinks, sliding and full layers in turn, a mixture of experts."""
    config = GptOssConfig(
        **_COMMON,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=SLIDING_WINDOW,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return _write(GptOssForCausalLM, config, folder)


def deepseek_v2(folder: Path) -> Path:
    """Multi-head latent attention (MLA)."""
    config = DeepseekV2Config(
        **_COMMON,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=2,
    )
    return _write(DeepseekV2ForCausalLM, config, folder)


def _write(model_class: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0)
                parameter /= parameter.shape[1] ** 0.5
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
