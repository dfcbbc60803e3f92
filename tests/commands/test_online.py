"""Load on a server through vLLM's serving benchmark: a row per request, goodput, failures, and a server that ends."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep

import pytest

from vllm_int8kv.commands import serve
from vllm_int8kv.commands.bench import config as bench_config
from vllm_int8kv.commands.bench import online, workload
from vllm_int8kv.evaluation.cache_spec import CacheSpec

ROOT = Path(__file__).resolve().parents[2]
TOKENS, STEP_S = 4, 0.05


class Streaming(BaseHTTPRequestHandler):
    """Answers like the completions endpoint of vLLM, a token every `STEP_S`; fails where the prompt begins with 0."""

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if body["prompt"][0] == 0:
            self.send_error(500, "the engine is broken")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        usage = {"completion_tokens": TOKENS, "prompt_tokens": len(body["prompt"])}
        for event in [*[{"choices": [{"text": "a"}]}] * TOKENS, {"choices": [], "usage": usage}]:
            sleep(STEP_S)
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Streaming)
    found.bodies = []
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()


@pytest.fixture
def config():
    return bench_config.load(ROOT / "configs" / "bench" / "cpu_online.yaml")


def test_the_server_gets_the_options_of_the_cache(config, monkeypatch):
    """As its file of options comes through the command that serves."""
    commands = []
    monkeypatch.setattr(online, "bind_cores", lambda config, core_start: None)
    monkeypatch.setattr(online.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(online.subprocess, "Popen", lambda command, **options: commands.append(command))
    monkeypatch.setattr(online.Server, "_wait_until_healthy", lambda server: None)
    engine_args = {"additional_config": {"another": 1}, "max_model_len": 512}
    config = replace(config, kv_cache_seqs=None, engine_args=engine_args)
    policy = CacheSpec("int8_custom:layer_policy=a.yaml", "int8_custom", {"layer_policy": {0: "auto", 3: "k4v4"}})
    for cache in (CacheSpec("auto", "auto"), CacheSpec("fp8:block_size=64", "fp8", {}, {"block_size": 64}), policy):
        server = online.Server(config, cache, 0, "127.0.0.1")
        _, options = serve.parse(commands[-1][commands[-1].index("serve") + 1 :])
        assert options.kv_cache_dtype == cache.kv_cache_dtype
        assert options.block_size == cache.engine_options.get("block_size")
        # In JSON, which vLLM makes of the mapping, layers are strings; the option takes those too.
        layers = {str(layer): name for layer, name in cache.int8_kv.get("layer_policy", {}).items()}
        assert options.additional_config == {"another": 1} | ({"int8_kv": {"layer_policy": layers}} if layers else {})
        assert (options.max_model_len, options.port) == (512, server.port)


def measure(config, server, prompts):
    requests = [workload.Request(f"{i:06d}", prompt, TOKENS) for i, prompt in enumerate(prompts)]
    case = replace(config.cases[0], num_requests=len(prompts), output_len=TOKENS, request_rate=20.0)
    replica = {"url": f"http://127.0.0.1:{server.server_address[1]}"}
    done = []
    return online.measure(config, case, ("auto", 0), replica, requests, done.append), done


@pytest.mark.parametrize(("objective_ms", "goodput"), [({"ttft": 2000.0, "tpot": 2000.0}, 6), ({"ttft": 1.0}, 0)])
def test_every_request_is_a_row(config, server, objective_ms, goodput):
    config = replace(config, goodput_ms=objective_ms)
    run, done = measure(config, server, [[5, 6, 7]] * 6)
    assert run.is_clean
    assert done == [TOKENS] * 6
    for row in run.rows:
        assert (row.input_tokens, row.output_tokens, len(row.itl_ms)) == (3, TOKENS, TOKENS - 1)
        assert row.ttft_ms >= STEP_S * 1e3 * 0.9
        assert row.e2e_ms == pytest.approx(row.ttft_ms + sum(row.itl_ms), abs=1)
    assert run.server["request_goodput"] * run.duration_s == pytest.approx(goodput)
    assert run.duration_s >= 5 / 20 * 0.9, "arrivals at the rate asked for"
    sent = server.bodies[0]
    assert (sent["prompt"], sent["max_tokens"], sent["ignore_eos"], sent["temperature"]) == (
        [5, 6, 7],
        TOKENS,
        True,
        0.0,
    )


def test_a_failed_request_is_no_success(config, server):
    run, _ = measure(config, server, [[5], [0], [6]])
    assert [row.error is not None for row in run.rows] == [False, True, False]
    assert "the engine is broken" in run.rows[1].error
    assert [row.output_tokens for row in run.rows] == [TOKENS, 0, TOKENS]
