"""The Ray cluster: connecting, the plugin on every node, and room for the replicas."""

import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from vllm_int8kv.commands.bench.config import BenchConfig, Device, Mode
from vllm_int8kv.commands.serve import PLUGIN_NAME, is_plugin_filtered_out
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.machine import vllm_distribution

CHECK_TIMEOUT_S = 120.0


class ClusterError(RuntimeError):
    """The cluster cannot run this configuration; the message says what is missing where."""


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine that ends with the block."""
    # Ray's own reports go to its log files: the console belongs to the progress bars.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    options["runtime_env"] = {"env_vars": variables}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's default of 15 leaves replicas, which are what is measured, 3% of a core that another process wants.
        os.environ.setdefault("RAY_worker_niceness", "0")
        local = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        ray.init(address="local", **local, **options)
    else:
        ray.init(address=address, **options)
    try:
        yield
    finally:
        ray.shutdown()


def shared_memory() -> set[Path]:
    """Files of Python's shared memory that processes of a cluster started here use.

    Killed by Ray, vLLM's engine and its workers leave 160 MB each in them.
    """
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError):  # it may have ended
            maps = Path("/proc", str(process.pid), "maps").read_text()
            found |= {Path(name) for name in re.findall(r"/dev/shm/psm_\w+", maps)}
    return found


def plugin_problem() -> str | None:
    """Runs on a node: why vLLM would not find the plugin there, if so."""
    if not any(point.name == PLUGIN_NAME for point in metadata.entry_points(group="vllm.general_plugins")):
        return "vllm-int8kv is not installed"
    if is_plugin_filtered_out():
        return f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']!r} leaves out {PLUGIN_NAME}"
    return None


def inspect_node() -> dict[str, Any]:
    """Runs on a node: what matters for a fair comparison."""
    versions = {name: metadata.version(name) for name in ("vllm-int8kv", "torch")}
    if vllm := vllm_distribution():
        versions[vllm.name] = vllm.version
    return {"host": socket.gethostname(), "problem": plugin_problem(), "versions": versions}


def node_name(node: dict[str, Any]) -> str:
    """How a message names a node of `ray.nodes()`."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})"


def alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(config: BenchConfig) -> None:
    """Make sure that every node can run a replica.

    Raises:
        ClusterError: a node has no plugin although it is asked for, cannot answer, or has other versions; named.
    """
    nodes, problems = alive_nodes(), []
    task = ray.remote(inspect_node)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [task.options(num_cpus=0, scheduling_strategy=place).remote() for place in places]
    found = {}
    for node, answer in zip(nodes, answers, strict=True):
        try:
            found[node_name(node)] = ray.get(answer, timeout=CHECK_TIMEOUT_S)
        except (ray.exceptions.RayError, ModuleNotFoundError) as error:
            last = str(error).strip().splitlines()[-1]
            problems.append(f"node {node_name(node)} cannot run the check: {last}")
    is_needed = any(cache.kv_cache_dtype == KV_CACHE_DTYPE for cache in config.kv_cache_dtypes)
    for name, node in found.items():
        if is_needed and node["problem"]:
            problems.append(f"node {name}: {node['problem']}")
    newest = Counter(tuple(sorted(node["versions"].items())) for node in found.values()).most_common(1)
    for name, node in found.items():
        if (versions := tuple(sorted(node["versions"].items()))) != newest[0][0]:
            problems.append(f"node {name} has {dict(versions)}, other nodes have {dict(newest[0][0])}")
    if problems:
        raise ClusterError("\n".join(problems))


def bundles(config: BenchConfig) -> list[dict[str, float]]:
    """What one replica asks Ray for: a bundle per GPU, which may lie on different nodes, or one bundle of cores.

    The server of mode online is one process tree, so its GPUs are one bundle.
    """
    if config.device == Device.cpu:
        return [{"CPU": config.cpus_per_replica}]
    if config.mode == Mode.online:
        return [{"GPU": config.world_size, "CPU": config.cpus_per_replica * config.world_size}]
    return [{"GPU": 1, "CPU": config.cpus_per_replica}] * config.world_size


def missing(wanted: list[dict[str, float]], free: dict[str, dict[str, float]]) -> list[str]:
    """Which bundles do not fit, after the others took their place on the first node that has room.

    Args:
        free: resources by node name.
    """
    free = {name: dict(resources) for name, resources in free.items()}
    problems = []
    for bundle in wanted:
        for resources in free.values():
            if all(resources.get(name, 0) >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    resources[name] -= amount
                break
        else:
            problems.append(_text(bundle))
    return problems


def _text(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))


def _relevant(resources: dict[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0) for name in ("CPU", "GPU") if name == "CPU" or name in resources}


def check_room(config: BenchConfig) -> None:
    """Compare what the replicas ask for with what the nodes have, used or not.

    Raises:
        ClusterError: they can never fit; says what each node has and what does not fit.
    """
    totals = {node_name(node): _relevant(node["Resources"]) for node in alive_nodes()}
    wanted = bundles(config) * config.replicas
    if problems := missing(wanted, totals):
        per_replica = " + ".join(_text(bundle) for bundle in bundles(config))
        have = "; ".join(f"{name} has {_text(resources)}" for name, resources in totals.items())
        lacking = "; ".join(f"{count} x ({text})" for text, count in Counter(problems).items())
        raise ClusterError(
            f"{config.replicas} replicas of {per_replica} each do not fit into this cluster: {have}. Missing: {lacking}"
        )


@dataclass(frozen=True)
class Place:
    """Room for one replica."""

    group: PlacementGroup
    core_start: int
    """cores of its host that belong to replicas before it"""

    def options(self, config: BenchConfig) -> dict[str, Any]:
        """For the replica's actor. vLLM's Ray executor takes its GPUs from the placement group around it."""
        strategy = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        own = bundles(config)[0] if len(bundles(config)) == 1 else {}
        return {"num_cpus": own.get("CPU", 0), "num_gpus": own.get("GPU", 0), "scheduling_strategy": strategy}


@contextmanager
def reserve(config: BenchConfig) -> Iterator[list[Place]]:
    """Placement groups for all replicas, one each, so that one lost node takes no other replica with it.

    Raises:
        ClusterError: there is no room, now or ever.
    """
    check_room(config)
    groups = [placement_group(bundles(config), strategy="PACK") for _ in range(config.replicas)]
    try:
        for index, group in enumerate(groups):
            if not group.wait(timeout_seconds=config.start_timeout_s):
                free = _text(_relevant(ray.available_resources()))
                raise ClusterError(
                    f"replica {index + 1} of {config.replicas} got no room within start_timeout_s "
                    f"{config.start_timeout_s:g}: other work uses the cluster; free in all of it: {free}"
                )
        yield _places(config, groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def _places(config: BenchConfig, groups: list[PlacementGroup]) -> list[Place]:
    """Give replicas on one host different cores; two Ray nodes may share a host."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in alive_nodes()}
    taken: Counter[str] = Counter()
    places = []
    for group in groups:
        node = ray.util.placement_group_table(group)["bundles_to_node_id"][0]
        places.append(Place(group, taken[hosts[node]]))
        taken[hosts[node]] += config.cpus_per_replica
    return places
