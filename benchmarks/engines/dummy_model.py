"""A folder that vLLM takes for a large model: its configuration, the tokenizer of SmolLM2, and no weights.

    python -m benchmarks.engines.dummy_model llama-3.1-8b build/dummy-llama-3.1-8b
    vllm-int8kv bench gpu_dummy_8b

With `load_format: dummy` vLLM draws random weights, which take the same time as real ones. Nothing is downloaded.
"""

import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from vllm_int8kv.commands.models import smollm2

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Shape(StrEnum):
    llama_8b = "llama-3.1-8b"
    llama_70b = "llama-3.1-70b"
    qwen_7b = "qwen2.5-7b"


def make_config(shape: Shape) -> PretrainedConfig:
    """The published configuration of a model, with the token ids of SmolLM2's tokenizer where it names any."""
    if shape == Shape.qwen_7b:
        return Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
    large = shape == Shape.llama_70b
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=8192 if large else 4096,
        intermediate_size=28672 if large else 14336,
        num_hidden_layers=80 if large else 32,
        num_attention_heads=64 if large else 32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
        dtype="bfloat16",
    )


def make_dummy_model(shape: Shape, target: Path) -> Path:
    """Write configuration and tokenizer into a new folder.

    Raises:
        FileExistsError: the folder is there already.
    """
    target.mkdir(parents=True)
    make_config(shape).save_pretrained(target)
    source = smollm2()
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, target)
    return target


def main(
    shape: Annotated[Shape, typer.Argument(help="the model whose shape it has")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
) -> None:
    """Write a model folder without weights, for `load_format: dummy`."""
    try:
        make_dummy_model(shape, target)
    except (OSError, ImportError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)
