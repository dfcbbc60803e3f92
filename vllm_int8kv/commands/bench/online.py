"""The OpenAI server under load: a server in a Ray actor, requests and metrics from vLLM's own serving benchmark."""

import asyncio
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import yaml

from vllm_int8kv.commands.bench.config import BenchConfig, Case
from vllm_int8kv.commands.bench.replica import Row, bind_cores, engine_args, environment, milliseconds
from vllm_int8kv.commands.bench.sweep import Run
from vllm_int8kv.commands.bench.workload import Request
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engines.process import die_with_parent
from vllm_int8kv.evaluation.engines.worker_extension import WorkerExtension, merged

PERCENTILES = [50.0, 90.0, 99.0]
ENDPOINT = "openai-with-progress"
"""Our entry among the request functions of vLLM's benchmark."""
STOP_TIMEOUT_S = 30.0


class Server:
    """The actor: `vllm-int8kv serve` with the options of the configuration.

    Args:
        core_start: how many cores of this node belong to replicas before this one.
        client_ip: of the driver; a server on the same node listens on the loopback address only.
    """

    def __init__(self, config: BenchConfig, cache: CacheSpec, core_start: int, client_ip: str) -> None:
        from vllm_int8kv.commands.models import resolve

        self.config = config
        bind_cores(config, core_start)
        model = resolve(config.model)
        self.ip = "127.0.0.1" if client_ip == ray.util.get_node_ip_address() else ray.util.get_node_ip_address()
        with socket.socket() as sock:
            sock.bind((self.ip, 0))
            self.port = sock.getsockname()[1]
        options = engine_args(config, model, cache) | {"model": model}
        options |= {"host": self.ip, "port": self.port, "served_model_name": config.model}
        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / "serve.yaml"
        file.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in options.items()}))
        self.log = Path(self.folder.name) / "log.txt"
        command = [sys.executable, "-m", "vllm_int8kv.commands.cli", "serve", "--config", str(file)]
        variables = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        variables["VLLM_SERVER_DEV_MODE"] = "1"  # for /collective_rpc, as vLLM's own benchmark does
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=variables, preexec_fn=die_with_parent
            )
        self._wait_until_healthy()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                tail = "\n".join(self.log.read_text().splitlines()[-30:])
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{tail}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start within start_timeout_s {self.config.start_timeout_s:g}")

    @property
    def url(self) -> str:
        return f"http://{self.ip}:{self.port}"

    def describe(self) -> dict[str, Any]:
        """As `Replica.describe`, with the address; the cache's size is what the server's metrics say."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            metrics = response.read().decode()
        (info,) = re.findall(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', info))
        call = json.dumps({"method": WorkerExtension.attention_backends.__name__}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/collective_rpc", call, headers)) as response:
            backends = json.load(response)["results"]
        return {
            "host": socket.gethostname(),
            "pid": self.process.pid,
            "cores": os.environ.get("VLLM_CPU_OMP_THREADS_BIND"),
            "backends": merged(backends),
            "kv_cache_tokens": int(labels["num_gpu_blocks"]) * int(labels["block_size"]),
            "environment": environment(self.config),
            "url": self.url,
        }

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(STOP_TIMEOUT_S)


OnProgress = Callable[[int], object]
"""Called with the output tokens of a request when it has ended."""


def load(
    config: BenchConfig, case: Case, url: str, requests: list[Request], rate: float, on_progress: OnProgress
) -> tuple[dict[str, Any], list[Row]]:
    """Send requests at `rate` per second with Poisson arrivals; returns vLLM's metrics and one row per request."""
    import numpy as np
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, async_request_openai_completions

    async def request_func(*args: Any, **kwargs: Any) -> Any:
        output = await async_request_openai_completions(*args, **kwargs)
        on_progress(output.output_tokens)
        return output

    ASYNC_REQUEST_FUNCS[ENDPOINT] = request_func
    np.random.seed(config.seed)  # the arrival times
    samples = [
        SampleRequest(request.prompt_token_ids, len(request.prompt_token_ids), request.output_len, request_id=None)
        for request in requests
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # vLLM prints its own report
        result = asyncio.run(
            serve.benchmark(
                task_type=serve.TaskType.GENERATION,
                endpoint_type=ENDPOINT,
                api_url=f"{url}/v1/completions",
                base_url=url,
                model_id=config.model,
                model_name=config.model,
                tokenizer=None,
                input_requests=samples,
                logprobs=None,
                request_rate=rate,
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=["ttft", "tpot", "itl", "e2el"],
                selected_percentiles=PERCENTILES,
                ignore_eos=True,
                goodput_config_dict=dict(config.goodput_ms),
                max_concurrency=case.max_concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0.0},
                ready_check_timeout_sec=0,
            )
        )
    return result, to_rows(requests, result)


def to_rows(requests: list[Request], result: dict[str, Any]) -> list[Row]:
    """Rows out of the lists of vLLM's result."""
    rows = []
    for index, request in enumerate(requests):
        row = Row(request.request_id, result["input_lens"][index])
        if error := result["errors"][index]:
            row.error = error.strip().splitlines()[-1]
        else:
            row.output_tokens = result["output_lens"][index]
            row.ttft_ms = milliseconds(result["ttfts"][index])
            row.itl_ms = [milliseconds(value) for value in result["itls"][index]]
            row.e2e_ms = milliseconds(result["latencies"][index])
        rows.append(row)
    return rows


def measure(
    config: BenchConfig,
    case: Case,
    key: tuple[str, int],
    replica: dict[str, Any],
    requests: list[Request],
    on_progress: OnProgress,
) -> Run:
    """One run against a server; `key` is the name of the cache and the round."""
    result, rows = load(config, case, replica["url"], requests, case.request_rate, on_progress)
    names = ("request_throughput", "request_goodput", "output_throughput", "max_output_tokens_per_s")
    return Run(
        *key,
        asdict(case),
        duration_s=result["duration"],
        replicas=[replica],
        peak_running_seqs=int(result["max_concurrent_requests"]),
        server={name: result[name] for name in names},
        rows=rows,
    )
