"""The copy of a model in which every query head has a KV head of its own."""

import json

import pytest
import tiny_models
import torch

from benchmarks.accuracy import mha_model
from benchmarks.accuracy.mha_model import make_mha_model


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.qwen2, tiny_models.qwen3])
def test_it_answers_as_the_model_does(make, tmp_path):
    from transformers import AutoModelForCausalLM

    folders = make(tmp_path / "gqa"), make_mha_model(tmp_path / "gqa", tmp_path / "mha")
    grouped, copy = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)

    assert copy.config.num_key_value_heads == copy.config.num_attention_heads > grouped.config.num_key_value_heads
    token_ids = torch.arange(40)[None] * 7 % tiny_models.VOCAB_SIZE
    with torch.inference_mode():
        torch.testing.assert_close(copy(token_ids).logits, grouped(token_ids).logits, rtol=0, atol=1e-4)


def test_what_is_copied_and_what_is_refused(tmp_path):
    source = tiny_models.llama(tmp_path / "gqa")
    (source / "tokenizer.json").write_text("{}")
    copy = make_mha_model(source, tmp_path / "mha")
    assert (copy / "tokenizer.json").read_text() == "{}"
    with pytest.raises(SystemExit, match="mha has no grouped queries: 6 query heads and as many KV heads"):
        mha_model.main(str(copy), tmp_path / "again")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(SystemExit, match="gqa has 6 weights of k_proj and v_proj in 4 layers; expected one of each"):
        mha_model.main(str(source), tmp_path / "other")
