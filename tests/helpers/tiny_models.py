"""Tiny random models of real architectures, written as Hugging Face folders without a tokenizer.

Random weights make near-ties, so tests compare their log-probabilities, not their greedy tokens. The weights are
drawn wider than transformers does: otherwise attention is nearly uniform and a broken cache would go unnoticed.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PaliGemmaConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
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


def llama(
    folder: Path, *, num_layers: int = 3, num_heads: int = 6, num_kv_heads: int = 2, head_size: int = 64, seed: int = 0
) -> Path:
    """Full attention; three queries per KV head unless told otherwise."""
    config = LlamaConfig(
        **_COMMON,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
    )
    return _write(LlamaForCausalLM, config, folder, seed=seed)


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


def paligemma(folder: Path) -> Path:
    """The configuration of a model whose image tokens see one another in both directions; no weights."""
    text = GemmaConfig(**_COMMON, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=64)
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=192)
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    config.save_pretrained(folder)
    return folder


def gpt_oss(folder: Path, seed: int = 0) -> Path:
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
    return _write(GptOssForCausalLM, config, folder, seed=seed)


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


def qwen2(folder: Path) -> Path:
    """Biases on Q, K and V, those of K large."""
    config = Qwen2Config(**_COMMON, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    return _write(Qwen2ForCausalLM, config, folder, k_bias=2.0)


def qwen3(folder: Path) -> Path:
    """Q and K normalized per head."""
    config = Qwen3Config(
        **_COMMON,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        use_sliding_window=False,
    )
    return _write(Qwen3ForCausalLM, config, folder)


def phi(folder: Path) -> Path:
    """RoPE on half of the head, attention and MLP in parallel."""
    config = PhiConfig(**_COMMON, num_hidden_layers=2, num_attention_heads=3, partial_rotary_factor=0.5)
    return _write(PhiForCausalLM, config, folder)


def opt(folder: Path) -> Path:
    """Learned positions, no rotation of Q and K."""
    common = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
    config = OPTConfig(**common, num_hidden_layers=2, num_attention_heads=3, ffn_dim=128, word_embed_proj_dim=192)
    return _write(OPTForCausalLM, config, folder)


def bloom(folder: Path) -> Path:
    """ALiBi."""
    config = BloomConfig(
        **{
            name: _COMMON[name]
            for name in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")
        },
        n_layer=2,
        n_head=3,
    )
    return _write(BloomForCausalLM, config, folder)


def falcon(folder: Path) -> Path:
    """Attention that vLLM builds without a cache configuration."""
    names = ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")
    config = FalconConfig(
        **{name: _COMMON[name] for name in names},
        num_hidden_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        new_decoder_architecture=True,
        max_position_embeddings=512,
    )
    return _write(FalconForCausalLM, config, folder)


def gemma3n(folder: Path) -> Path:
    """The last two layers attend to the KV cache of earlier ones."""
    config = Gemma3nTextConfig(
        **_COMMON | {"tie_word_embeddings": True, "intermediate_size": [128] * 5},
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=32,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 5,
    )
    return _write(Gemma3nForCausalLM, config, folder)


def lfm2(folder: Path) -> Path:
    """A hybrid: layers with a convolution state beside layers with a KV cache."""
    config = Lfm2Config(
        **_COMMON,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        block_auto_adjust_ff_dim=False,
        # What vLLM reads under names of the first published checkpoints.
        conv_dim=192,
        block_dim=192,
        block_ff_dim=128,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_norm_eps=1e-5,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )
    return _write(Lfm2ForCausalLM, config, folder)


def bert(folder: Path) -> Path:
    """An encoder, without a KV cache."""
    common = {name: value for name, value in _COMMON.items() if name != "tie_word_embeddings"}
    config = BertConfig(**common, num_hidden_layers=2, num_attention_heads=3)
    return _write(BertModel, config, folder)


def _write(
    model_class: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    k_bias: float = 0.0,
    seed: int = 0,
) -> Path:
    torch.manual_seed(seed)
    with _served_classes(config):
        model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0)
                parameter /= parameter.shape[1] ** 0.5
            elif name.endswith("k_proj.bias"):
                parameter.normal_(std=k_bias)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _served_classes(config: PreTrainedConfig) -> AbstractContextManager[None]:
    """For classes of transformers that vLLM has served in this process: since then they ask for its configuration."""
    if "vllm" not in sys.modules:
        return nullcontext()
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config

    vllm_config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    object.__setattr__(vllm_config, "model_config", SimpleNamespace(hf_config=config))
    return set_current_vllm_config(vllm_config)
