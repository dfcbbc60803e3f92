"""One vLLM engine inside a Ray actor. Nothing here imports vLLM before the actor has its cores."""

import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_int8kv.commands.bench.config import STORE, BenchConfig, Device, Mode
from vllm_int8kv.commands.bench.workload import Request
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engines import worker_extension
from vllm_int8kv.store import transfer_config

PERIOD_S = 0.5
"""Longest time between two reports of progress, if the engine's steps are shorter."""


@dataclass
class Row:
    """One request as the client saw it; a line of the side file. Times count from when it was sent."""

    request_id: str
    input_tokens: int
    output_tokens: int = 0
    ttft_ms: float | None = None
    """time to first token"""
    itl_ms: list[float] = field(default_factory=list)
    """inter-token latencies: from one output to the next, one fewer than outputs"""
    e2e_ms: float | None = None
    first_token: int | None = None
    """id of the first token, to compare what the caches answer; None online"""
    replica: int = 0
    attempt: int = 1
    """2 after its first replica was lost"""
    error: str | None = None
    """why it failed; None for a success"""


@dataclass(frozen=True)
class Progress:
    """What happened in a replica since its last report."""

    output_tokens: int
    rows: list[Row]
    """requests that finished"""
    peak_running_seqs: int
    """most sequences that one step has advanced since the run began"""


class Replica:
    """The actor. Ray starts it in its placement group; its own core numbers come from the driver.

    Args:
        core_start: how many cores of this node belong to replicas before this one.
    """

    def __init__(self, config: BenchConfig, cache: CacheSpec, core_start: int) -> None:
        self.config = config
        bind_cores(config, core_start)
        if config.world_size > 1:
            # This actor owns no GPU, its workers do. Ray hides all GPUs from it, and vLLM would see no CUDA.
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        from vllm import LLM

        from vllm_int8kv.commands.models import resolve

        model = resolve(config.model)
        self.llm = LLM(model, **engine_args(config, model, cache))

    def describe(self) -> dict[str, Any]:
        """Where this replica runs and what it got."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "cores": os.environ.get("VLLM_CPU_OMP_THREADS_BIND"),
            "backends": worker_extension.attention_backends(self.llm),
            "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
            "environment": environment(self.config),
        }

    def stop(self) -> None:
        """End the engine's own processes; killing the actor would leave their shared memory behind."""
        self.llm.llm_engine.engine_core.shutdown()

    def run(self, requests: list[Request], max_concurrency: int | None) -> Iterator[Progress]:
        """Answer requests with at most so many in flight; reports until the last has finished."""
        self.llm.reset_prefix_cache()
        engine = self.llm.llm_engine
        waiting, running = deque(requests), {}
        finished: list[Row] = []
        tokens = peak = 0
        reported = time.perf_counter()
        while waiting or running:
            while waiting and (max_concurrency is None or len(running) < max_concurrency):
                request = waiting.popleft()
                row, sent = Row(request.request_id, len(request.prompt_token_ids)), time.perf_counter()
                try:
                    engine.add_request(request.request_id, *as_vllm(request))
                except ValueError as error:  # vLLM refuses the request; the others go on
                    row.error = str(error)
                    finished.append(row)
                else:
                    running[request.request_id] = (row, sent, [])
            outputs = engine.step() if running else []
            now = time.perf_counter()
            peak = max(peak, len(outputs))
            for output in outputs:
                row, sent, times = running[output.request_id]
                new = output.outputs[0].token_ids
                tokens += len(new)
                advance(row, sent, times, new, now)
                if output.finished:
                    del running[output.request_id]
                    finished.append(row)
            if now - reported > PERIOD_S or (not waiting and not running):
                yield Progress(tokens, finished, peak)
                finished, tokens, reported = [], 0, now


def bind_cores(config: BenchConfig, core_start: int) -> None:
    """Tell vLLM which cores its OpenMP threads have; before vLLM is imported."""
    if config.device != Device.cpu:
        return
    cores = sorted(os.sched_getaffinity(0))
    end = core_start + config.cpus_per_replica
    if len(cores) < end:
        raise RuntimeError(
            f"{socket.gethostname()} has {len(cores)} cores, but Ray placed replicas of {end} cores there: "
            "start Ray with the real number of CPUs"
        )
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[core_start:end]))


def advance(row: Row, sent: float, times: list[float], new: list[int], now: float) -> None:
    """Add the tokens that came at time `now` to a row; `times` holds when outputs came."""
    if not new:
        return
    if row.ttft_ms is None:
        row.ttft_ms, row.first_token = milliseconds(now - sent), new[0]
    else:
        row.itl_ms.append(milliseconds(now - times[-1]))
    times.append(now)
    row.output_tokens += len(new)
    row.e2e_ms = milliseconds(now - sent)


def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def as_vllm(request: Request) -> tuple:
    """Prompt and sampling parameters: greedy, exactly `output_len` tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=request.output_len,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    return {"prompt_token_ids": request.prompt_token_ids}, params


def engine_args(config: BenchConfig, model: str, cache: CacheSpec) -> dict[str, Any]:
    """The arguments of vLLM beside the model: the same for every cache, but for what the cache itself sets."""
    args: dict[str, Any] = {"max_num_seqs": config.max_num_seqs, "seed": config.seed}
    args["worker_extension_cls"] = worker_extension.CLASS
    args["disable_log_stats"] = config.mode == Mode.offline  # a server's metrics say how large its cache is
    if config.longest is not None:
        args["max_model_len"] = config.longest
    if config.kv_cache_seqs is not None:
        args["kv_cache_memory_bytes"] = kv_cache_bytes(config, model)
    if config.device == Device.cpu:
        args["distributed_executor_backend"] = "mp"  # vLLM binds OpenMP threads only in a worker of its own
    elif config.world_size > 1:
        args["distributed_executor_backend"] = "ray" if config.mode == Mode.offline else "mp"
        args["tensor_parallel_size"] = config.tensor_parallel_size
        args["pipeline_parallel_size"] = config.pipeline_parallel_size
    args |= config.engine_args
    args |= cache.llm_arguments(args.get("additional_config"))
    if STORE in cache.name:
        options = args["kv_transfer_config"]["kv_connector_extra_config"]
        args["kv_transfer_config"] = transfer_config(options | {"path": config.kv_store_path})
    return args


def kv_cache_bytes(config: BenchConfig, model: str) -> int:
    """Memory in which `kv_cache_seqs` longest requests fit with an unquantized cache, per GPU of the engine."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_int8kv.evaluation.engines.forced_decoding import kv_cache_memory_bytes

    block_size = config.engine_args.get("block_size", 128 if config.device == Device.cpu else 16)
    blocks = config.kv_cache_seqs * -(-config.longest // block_size) + 1  # vLLM keeps block 0 for itself
    args = EngineArgs(model=model, dtype=config.engine_args.get("dtype", "auto"))
    return kv_cache_memory_bytes(args.create_model_config(), blocks * block_size) // config.world_size


def environment(config: BenchConfig) -> dict[str, str | None]:
    """The fields of a record that say on what and with which versions a replica ran."""
    from vllm_int8kv.evaluation import record

    found = {name: record.environment()[name] for name in ("device", "torch", "vllm")}
    if config.device == Device.cuda:
        import torch
        from vllm.platforms import current_platform

        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        found["device"] = current_platform.get_device_name()
        found["driver"] = driver.stdout.split("\n")[0] or None
        found["cuda"] = torch.version.cuda
    return found
