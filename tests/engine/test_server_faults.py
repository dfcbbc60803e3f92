"""What a server listens on, its API key, and what becomes of it without its engine core."""

from collections.abc import Iterator

import openai
import psutil
import pytest
from servers import STOP_SECONDS, Server

from vllm_int8kv.commands import models

pytestmark = pytest.mark.engine

API_KEY = "secret"
OPTIONS = f"--enforce-eager --max-model-len 512 --max-num-seqs 4 --kv-cache-memory-bytes 67108864 --api-key {API_KEY}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The last test ends it."""
    models.smollm2()
    with Server(OPTIONS.split(), tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


def stream(client: openai.OpenAI):
    """A long answer, a token at a time."""
    options = {"max_tokens": 400, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
    return client.completions.create(model="smollm2", prompt="a b c d e f g", **options)


def test_it_is_reached_where_it_was_told_only_and_with_its_key(server):
    """vLLM's processes talk to each other over loopback sockets; nothing listens for the outside."""
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in server.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", server.port) in listening
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    with pytest.raises(openai.AuthenticationError):
        server.client("guess").models.list()
    assert [model.id for model in server.client(API_KEY).models.list()] == ["smollm2"]


def test_a_killed_engine_core_fails_its_requests_and_ends_the_server(server):
    """No client of a stream takes half an answer for a whole one, and nothing is left."""
    processes = server.processes()
    (core,) = (process for process in processes if "EngineCore" in "".join(process.cmdline()))
    answer = stream(server.client(API_KEY))
    chunks = [next(answer)]
    core.kill()
    with pytest.raises((openai.APIError, openai.APIConnectionError)):
        chunks += answer
    assert len(chunks) < 400
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)
    server.process.wait(STOP_SECONDS)  # with 0, as vLLM has it
    assert not psutil.wait_procs(processes, timeout=STOP_SECONDS)[1], "processes left behind"
