"""A server that loses its engine core, what it listens on, and its API key."""

import openai
import psutil
import pytest
from servers import STOP_SECONDS, Server

from vllm_int8kv import models

pytestmark = pytest.mark.engine

OPTIONS = ["--enforce-eager", "--max-model-len=512", "--max-num-seqs=4", "--kv-cache-memory-bytes=67108864"]


def stream(client: openai.OpenAI):
    """A long answer, a token at a time."""
    options = {"max_tokens": 400, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
    return client.completions.create(model="smollm2", prompt="a b c d e f g", **options)


def test_a_killed_engine_core_fails_its_requests_and_ends_the_server(tmp_path):
    """No client of a stream takes half an answer for a whole one, and nothing is left."""
    models.smollm2()
    with Server(OPTIONS, tmp_path / "log.txt") as server:
        processes = server.processes()
        (core,) = (process for process in processes if "EngineCore" in "".join(process.cmdline()))
        answer = stream(server.client())
        chunks = [next(answer)]
        core.kill()
        with pytest.raises((openai.APIError, openai.APIConnectionError)):
            chunks += answer
        assert len(chunks) < 400
        assert all(chunk.choices[0].finish_reason is None for chunk in chunks)
        server.process.wait(STOP_SECONDS)  # with 0, as vLLM has it
        assert not psutil.wait_procs(processes, timeout=STOP_SECONDS)[1], "processes left behind"


def test_the_server_is_reached_where_it_was_told_only_and_with_its_key(tmp_path):
    """vLLM's processes talk to each other over loopback sockets; nothing listens for the outside."""
    models.smollm2()
    with Server([*OPTIONS, "--api-key", "secret"], tmp_path / "log.txt") as server:
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
        assert [model.id for model in server.client("secret").models.list()] == ["smollm2"]
