"""The throughput benchmark: requests to replicas that die, sweeps that stop, nodes without the plugin, real engines."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from processes import hear_sigint, wait_for
from ray.cluster_utils import Cluster

from vllm_int8kv.commands import models
from vllm_int8kv.commands.bench import cluster, dispatch, replica, sweep, workload
from vllm_int8kv.commands.bench import config as bench_config
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.cache_spec import CacheSpec

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "bench" / "cpu_smoke.yaml"
AUTO, K6V4 = (CacheSpec.parse(name, "name") for name in ("auto", "int8_custom:format=k6v4"))


@pytest.fixture(autouse=True)
def pickled_by_value():
    # Classes of this file go to Ray's workers whole: they cannot import it.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def config():
    return bench_config.load(SMOKE)


@pytest.fixture(scope="module")
def local_ray():
    with cluster.connect(None):
        yield


class FakeReplica:
    """Answers each request with one token; dies or raises when it comes to request `fatal`."""

    def __init__(self, fatal=None, raises=False, delay_s=0.0):
        self.fatal, self.raises, self.delay_s = fatal, raises, delay_s

    def run(self, requests, max_concurrency):
        from vllm_int8kv.commands.bench.replica import Progress, Row

        for request in requests:
            time.sleep(self.delay_s)
            if request.request_id == self.fatal:
                time.sleep(1.0)  # until what it has answered has arrived
                if self.raises:
                    raise RuntimeError("the engine is broken")
                os._exit(1)
            row = Row(request.request_id, 3, output_tokens=1, ttft_ms=1.0, e2e_ms=1.0, first_token=7)
            yield Progress(1, [row], 1)


def some_requests(count):
    return [workload.Request(f"{index:06d}", [1, 2, 3], 1) for index in range(count)]


def run_fakes(*kwargs, count=12):
    replicas = [ray.remote(FakeReplica).options(num_cpus=0).remote(**args) for args in kwargs]
    answered = []
    outcome = dispatch.Dispatch(replicas).run(
        some_requests(count), None, lambda replica, tokens, requests: answered.append(requests)
    )
    assert sorted(outcome.rows) == [f"{index:06d}" for index in range(count)], "every request, once"
    return outcome, sum(answered)


def test_requests_are_shared_and_answered(local_ray):
    outcome, answered = run_fakes({}, {}, {})
    assert answered == 12
    assert [row.replica for row in sorted(outcome.rows.values(), key=lambda row: row.request_id)] == [0, 1, 2] * 4
    assert not outcome.lost
    assert outcome.resubmitted == 0


@pytest.mark.parametrize(("raises", "reason"), [(False, "died"), (True, "the engine is broken")])
def test_a_lost_replica_costs_no_request(local_ray, raises, reason):
    outcome, answered = run_fakes({"fatal": "000004", "raises": raises}, {})
    assert answered == 12
    assert list(outcome.lost) == [0]
    assert reason in outcome.lost[0]
    assert outcome.resubmitted == 4  # of 0 2 4 6 8 10 it had answered two
    second = {row.request_id for row in outcome.rows.values() if row.attempt == 2}
    assert second == {"000004", "000006", "000008", "000010"}
    assert all(row.error is None and row.output_tokens == 1 for row in outcome.rows.values())


def test_a_request_that_kills_two_replicas_fails(local_ray):
    outcome, answered = run_fakes({"fatal": "000000"}, {"fatal": "000000"}, {}, count=3)
    assert answered == 2
    assert {row.request_id: row.error for row in outcome.rows.values() if row.error} == {
        "000000": "its replica was lost twice"
    }
    assert sorted(outcome.lost) == [0, 1]


def test_without_a_replica_left_the_rest_fails(local_ray):
    outcome, answered = run_fakes({"fatal": "000002"})
    assert answered == 2
    failed = [row for row in outcome.rows.values() if row.error]
    assert len(failed) == 10
    assert {row.error for row in failed} == {"no replica is left"}
    assert list(outcome.lost) == [0]


def test_missing_resources_are_named(local_ray, config):
    cores = len(os.sched_getaffinity(0))
    config = replace(config, replicas=cores + 1)
    message = rf"{cores + 1} replicas of 1 CPU each do not fit .* has {cores} CPU.*Missing: 1 x \(1 CPU\)"
    with pytest.raises(cluster.ClusterError, match=message), cluster.reserve(config):
        pass
    on_gpus = replace(config, device=bench_config.Device.cuda, replicas=1, tensor_parallel_size=4)
    with pytest.raises(cluster.ClusterError, match=r"Missing: 4 x \(1 CPU, 1 GPU\)"), cluster.reserve(on_gpus):
        pass


def test_a_busy_cluster_is_named(local_ray, config):
    config = replace(config, replicas=len(os.sched_getaffinity(0)), start_timeout_s=1.0)
    with (
        cluster.reserve(config),
        pytest.raises(cluster.ClusterError, match=r"replica 1 of \d+ got no room within start_timeout_s 1"),
        cluster.reserve(config),
    ):
        pass


def test_replicas_on_one_host_have_their_own_cores(local_ray, config):
    cores = len(os.sched_getaffinity(0))
    with cluster.reserve(replace(config, replicas=cores)) as places:
        assert sorted(place.core_start for place in places) == list(range(cores))


def test_gpu_engines_use_vllms_ray_executor():
    """As far as a machine without a GPU can tell: what is asked of Ray and what vLLM is told."""
    load = bench_config.load
    parallel = load(SMOKE.with_name("gpu_tensor_parallel.yaml"))
    args = replica.engine_args(parallel, parallel.model, AUTO)
    assert args["distributed_executor_backend"] == "ray"
    assert (args["tensor_parallel_size"], args["pipeline_parallel_size"]) == (4, 2)
    assert cluster.bundles(parallel) == [{"GPU": 1, "CPU": 1}] * 8
    options = cluster.Place(None, 0).options(parallel)
    assert (options["num_gpus"], options["num_cpus"]) == (0, 0), "the GPUs are for its workers"
    assert options["scheduling_strategy"].placement_group_capture_child_tasks
    single = load(SMOKE.with_name("gpu_kvtuner.yaml"))
    assert "distributed_executor_backend" not in replica.engine_args(single, single.model, AUTO)
    assert cluster.Place(None, 0).options(single)["num_gpus"] == 1
    served = replace(load(SMOKE.with_name("gpu_online.yaml")), tensor_parallel_size=2)
    assert cluster.bundles(served) == [{"GPU": 2, "CPU": 2}], "one process tree on one node"


def test_an_engine_gets_the_options_of_its_cache(config):
    """Beside what is the same for every cache."""
    config = replace(config, kv_cache_seqs=None, engine_args={"additional_config": {"another": 1}, "block_size": 32})
    args = {cache.name: replica.engine_args(config, "model", cache) for cache in (AUTO, K6V4)}
    assert args[AUTO.name]["additional_config"] == {"another": 1}
    assert args[K6V4.name]["additional_config"] == {"another": 1, "int8_kv": {"format": "k6v4"}}
    assert [found["kv_cache_dtype"] for found in args.values()] == ["auto", "int8_custom"]
    larger = CacheSpec("fp8:block_size=64", "fp8", engine_options={"block_size": 64})
    assert replica.engine_args(config, "model", larger)["block_size"] == 64
    assert args[AUTO.name]["block_size"] == 32


@pytest.fixture
def two_nodes(monkeypatch):
    """Two raylets on this machine, a CPU each; yields the cluster. The second node's environment is `node_env`."""
    ray.shutdown()
    clusters = []

    def start(**node_env):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        clusters.append(cluster)
        cluster.add_node(num_cpus=1, env_vars=node_env or None)
        return cluster

    yield start
    ray.shutdown()
    for started in clusters:
        started.shutdown()


def test_a_node_without_the_plugin_is_named(two_nodes, config):
    started = two_nodes(VLLM_PLUGINS="another")
    with cluster.connect(started.address):
        with pytest.raises(cluster.ClusterError) as error:
            cluster.check_nodes(config)
        without = next(node for node in ray.nodes() if node["NodeID"] != ray.get_runtime_context().get_node_id())
        assert str(error.value) == (f"node {cluster.node_name(without)}: VLLM_PLUGINS='another' leaves out int8kv")
        with pytest.raises(cluster.ClusterError, match="leaves out int8kv"):
            cluster.check_nodes(replace(config, kv_cache_dtypes=("auto", K6V4)))
        cluster.check_nodes(replace(config, kv_cache_dtypes=("auto",)))


def test_a_lost_node_costs_no_request(two_nodes, config):
    started = two_nodes()
    with cluster.connect(started.address), cluster.reserve(config) as places:
        fakes = [ray.remote(FakeReplica).options(**place.options(config)).remote(delay_s=0.3) for place in places]
        nodes = {ray.util.placement_group_table(place.group)["bundles_to_node_id"][0] for place in places}
        assert len(nodes) == 2, "one replica on each node"
        second = started.list_all_nodes()[1]
        threading.Timer(3.0, started.remove_node, [second], {"allow_graceful": False}).start()
        outcome = dispatch.Dispatch(fakes).run(some_requests(40), None, lambda *_: None)
    assert sorted(outcome.rows) == [f"{index:06d}" for index in range(40)]
    assert len(outcome.lost) == 1
    assert outcome.resubmitted > 0
    assert all(row.error is None for row in outcome.rows.values())


@pytest.mark.engine
def test_smoke_sweep_interrupted_and_continued(tmp_path):
    """What CI must show: two replicas, both caches, every request answered once, Ctrl-C clean, the rest continued."""
    models.smollm2()
    file = tmp_path / "cpu_smoke_k6v4.yaml"
    file.write_text(SMOKE.read_text().replace("[auto, int8_custom]", f'[auto, "{K6V4.name}"]'))
    command = [sys.executable, "-m", "vllm_int8kv.commands.cli", "bench", str(file), "--out", str(tmp_path)]
    # The workers of xdist say in COLUMNS that they are a terminal of 80.
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "COLUMNS")}
    log_file = tmp_path / "log.txt"
    with log_file.open("w") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
        process = subprocess.Popen(command, preexec_fn=hear_sigint, **options)
        wait_for(process, log_file, lambda: bool(list(tmp_path.glob("requests/*"))), interval=0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        shared = cluster.shared_memory()
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code == 130, log_file.read_text()[-3000:]
    assert len(children) > 3, "raylet, workers"
    assert not psutil.wait_procs(children, timeout=60)[1], "processes left behind"
    assert shared and not [path for path in shared if path.exists()], "shared memory left behind"
    assert not list(tmp_path.glob("*.jsonl")), "no record of half a sweep"
    assert "interrupted; the same command goes on from here" in log_file.read_text()
    assert "round 1/1, auto: starting ...\n" in log_file.read_text()

    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 runs are there" in done.stderr
    (file,) = tmp_path.glob("requests/*.jsonl.gz")
    runs = sweep.read(file).runs.values()
    assert [run.impl for run in runs] == ["auto", K6V4.name]
    for run in runs:
        assert [replica["backends"] for replica in run.replicas] == [
            ["CPU_ATTN" if run.impl == "auto" else "INT8_KV"]
        ] * 2
        assert len({replica["cores"] for replica in run.replicas}) == 2, "a core each"
        assert len({row.request_id for row in run.rows}) == len(run.rows) == 16
        assert {(row.output_tokens, len(row.itl_ms), row.error, row.attempt) for row in run.rows} == {(16, 15, None, 1)}
    lines = record.read("throughput", tmp_path)
    assert [(line.impl, line.metrics["num_requests"], line.metrics["failed_requests"]) for line in lines] == [
        ("auto", 16, 0),
        (K6V4.name, 16, 0),
    ]
    assert lines[1].metrics["kv_cache_tokens_per_replica"] > 5 * lines[0].metrics["kv_cache_tokens_per_replica"]
    assert K6V4.name in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
