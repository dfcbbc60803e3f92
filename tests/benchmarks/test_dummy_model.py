"""Folders of large models without weights, as the GPU benchmarks take them."""

import json

import pytest
import torch
from engines import engine

from benchmarks.engines import dummy_model

SHAPES = {"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "qwen2.5-7b": 7_615_616_512}
"""Parameters of the published models."""


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_that_of_the_model(shape):
    from transformers import AutoModelForCausalLM

    config = dummy_model.make_config(dummy_model.Shape(shape))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES[shape]


@pytest.mark.engine
def test_vllm_serves_it_with_random_weights(tmp_path):
    folder = dummy_model.make_dummy_model(dummy_model.Shape.llama_8b, tmp_path / "dummy")
    config = json.loads((folder / "config.json").read_text())
    smaller = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config | smaller | heads))
    with engine(folder, load_format="dummy", max_model_len=128) as llm:
        (output,) = llm.generate(["What is the capital of France?"], use_tqdm=False)
    assert output.outputs[0].token_ids


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(SystemExit, match="File exists"):
        dummy_model.main(dummy_model.Shape.qwen_7b, tmp_path)
