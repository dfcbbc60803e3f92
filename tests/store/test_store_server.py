"""`vllm-int8kv serve --kv-store`: a server that was started again finds what the one before computed."""

import re
import time
from pathlib import Path

import pytest
from servers import Server

from vllm_int8kv.commands import models
from vllm_int8kv.evaluation.demo import TEXT

pytestmark = pytest.mark.engine

BLOCK_SIZE = 32
NUM_BLOCKS = 8
OPTIONS = (
    f"--enforce-eager --max-model-len 512 --max-num-seqs 4 --kv-cache-memory-bytes 67108864 --block-size {BLOCK_SIZE}"
)


def ask(server: Server, prompt: list[int]) -> str:
    answer = server.client().completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=12)
    return answer.choices[0].text


def counted(server: Server, name: str) -> float:
    found = re.findall(rf"^vllm:kv_store_{name}_total\{{.*\}} ([\d.e+]+)", server.metrics(), re.MULTILINE)
    return float(found[0]) if found else 0.0


def test_a_restarted_server_finds_its_prompts(tmp_path: Path):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(models.smollm2()).encode(TEXT.read_text())
    prompt = tokens[: NUM_BLOCKS * BLOCK_SIZE + 5]
    options = [*OPTIONS.split(), "--kv-store", f"{tmp_path / 'store'}:max_bytes=100_000_000"]
    with Server(options, tmp_path / "first.txt") as server:
        answer = ask(server, prompt)
        deadline = time.monotonic() + 120
        while counted(server, "saved_blocks") < NUM_BLOCKS:
            assert time.monotonic() < deadline, server.metrics()
            ask(server, prompt[:3])  # counts come with steps
        assert counted(server, "saved_bytes") > 0 and counted(server, "loaded_blocks") == 0
    with Server(options, tmp_path / "second.txt") as server:
        assert ask(server, prompt) == answer
        assert counted(server, "loaded_blocks") == NUM_BLOCKS
        assert counted(server, "spared_seconds") == 0, "nothing tells how long it would have taken"
        ask(server, prompt[::-1])
        ask(server, prompt[:3])
        assert 0 < counted(server, "spared_seconds") < 60
        hits = re.findall(r"^vllm:external_prefix_cache_hits_total\{.*\} ([\d.e+]+)", server.metrics(), re.MULTILINE)
        assert float(hits[0]) == NUM_BLOCKS * BLOCK_SIZE
