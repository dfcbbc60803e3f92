"""`vllm-int8kv serve` with the embedded model, asked by the `openai` client. One server for the module."""

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from servers import STOP_SECONDS, Server

from vllm_int8kv.commands import models

pytestmark = pytest.mark.engine

QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models.smollm2()
    options = "--enforce-eager --max-model-len 512 --max-num-seqs 8 --kv-cache-memory-bytes 67108864"
    with Server(options.split(), tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


def ask(server: Server, question: str = QUESTION, **options):
    messages = [{"role": "user", "content": question}]
    return server.client().chat.completions.create(
        model="smollm2", messages=messages, temperature=0, max_tokens=16, **options
    )


def test_the_model_is_served_under_its_name(server):
    assert [model.id for model in server.client().models.list()] == ["smollm2"]


def test_chat(server):
    answer = ask(server)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_completion(server):
    answer = server.client().completions.create(model="smollm2", prompt="a b c d e f g", temperature=0, max_tokens=6)
    assert answer.choices[0].text == " h i j k l m"
    assert answer.usage.completion_tokens == 6


def test_streaming_says_the_same(server):
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask(server, stream=True) if chunk.choices]
    assert len(chunks) > 3, "came in one piece"
    assert "".join(chunks) == ask(server).choices[0].message.content


def test_concurrent_requests(server):
    """Eight at a time, half of them the same: equal questions get equal answers, whatever else is in the batch."""
    questions = [
        QUESTION,
        "Name a color.",
        QUESTION,
        "Count to five.",
        QUESTION,
        "Say hello.",
        QUESTION,
        "What is ice?",
    ]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = [answer.choices[0].message.content for answer in pool.map(lambda q: ask(server, q), questions)]
    assert all(answers)
    assert all("Paris" in answer for answer in answers[::2])


def test_metrics_name_the_cache(server):
    ask(server)
    metrics = server.metrics()
    (info,) = re.findall(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
    assert 'cache_dtype="int8_custom"' in info
    (served,) = re.findall(
        r'^vllm:request_success_total\{.*finished_reason="stop".*\} ([\d.e+]+)', metrics, re.MULTILINE
    )
    assert float(served) >= 1


def test_sigterm_ends_it_cleanly(server):
    """Last in the module: it stops the server."""
    _, *children = server.processes()
    assert len(children) >= 2, "engine core and worker"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(STOP_SECONDS) == 0
    assert not psutil.wait_procs(children, timeout=STOP_SECONDS)[1], "processes left behind"
    with pytest.raises(openai.APIConnectionError):
        ask(server)
