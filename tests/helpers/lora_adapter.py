"""A LoRA adapter for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LORA_RANK = 8


def write_adapter(folder: Path, seed: int = 3) -> Path:
    """A LoRA of the tiny Llama's Q, K and V, as PEFT writes them."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    weights = {}
    for layer in range(3):
        for name, width in (("q_proj", 6 * 64), ("k_proj", 2 * 64), ("v_proj", 2 * 64)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(LORA_RANK, 192) / 14
            weights[f"{prefix}.lora_B.weight"] = torch.randn(width, LORA_RANK) / 3
    save_file(weights, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=LORA_RANK, lora_alpha=LORA_RANK, bias="none", task_type="CAUSAL_LM")
    config["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
