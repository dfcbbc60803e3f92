"""What a file in `configs/bench` says: one frozen dataclass, flat YAML, unknown keys refused."""

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, model_validator
from pydantic.dataclasses import dataclass

from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.record import Device
from vllm_int8kv.store import transfer_config

OPTIONS = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Count = Annotated[int, Field(ge=1)]

RESERVED_ENGINE_ARGS = {
    "model": "model",
    "kv_cache_dtype": "kv_cache_dtypes",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "data_parallel_size": "replicas",
    "distributed_executor_backend": "tensor_parallel_size",
}
"""Arguments of vLLM that another key sets."""


STORE = ":kv_store="
"""Behind the cache and its other options: a KV store between the engines, and the codec of its files."""


def _parse_cache(value: object, info: ValidationInfo) -> CacheSpec:
    """An entry of `kv_cache_dtypes`; the path of a layer policy is relative to the folder that the context names."""
    if isinstance(value, CacheSpec):
        return value
    if not isinstance(value, str):
        raise ValueError(f"kv_cache_dtypes must be strings like int8_custom:format=k6v4, got {value!r}")
    reserved = {name: f"set it with the key {key!r}" for name, key in RESERVED_ENGINE_ARGS.items()}
    cache, separator, codec = value.partition(STORE)
    spec = CacheSpec.parse(cache, "kv_cache_dtypes", reserved=reserved, folder=(info.context or {}).get("folder"))
    return _with_store(spec, codec) if separator else spec


def _with_store(spec: CacheSpec, codec: str) -> CacheSpec:
    from vllm_int8kv.store.registry import check_codec  # with PyTorch, for which other caches need not wait

    check_codec(codec)
    options = spec.engine_options | {"kv_transfer_config": transfer_config({"codec": codec})}
    return replace(spec, name=f"{spec.name}{STORE}{codec}", engine_options=options)


Cache = Annotated[CacheSpec, BeforeValidator(_parse_cache)]


class Mode(StrEnum):
    offline = "offline"
    online = "online"


class Dataset(StrEnum):
    random = "random"
    sharegpt = "sharegpt"
    prefix_repetition = "prefix_repetition"
    custom = "custom"


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Case:
    """One point of a sweep. Every kv_cache_dtype answers the same requests."""

    num_requests: Count
    """requests of all replicas together"""
    input_len: Count | None = None
    """prompt tokens, without the shared prefix; random and prefix_repetition only, required there"""
    output_len: Count | None = None
    """output tokens of each request; None takes the lengths of the file"""
    prefix_len: Annotated[int, Field(ge=0)] = 0
    """tokens that requests share at their beginning; random and prefix_repetition only"""
    max_concurrency: Count | None = None
    """requests in flight per replica; None sends all at once"""
    request_rate: Annotated[float, Field(gt=0)] | None = None
    """requests per second, Poisson arrivals; online only, required there"""


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class BenchConfig:
    """A sweep: for every round and kv_cache_dtype the engines start once and run all cases."""

    mode: Mode
    """offline: engines in Ray actors; online: the OpenAI server under load from vLLM's serving benchmark"""
    device: Device
    """what an engine runs on"""
    model: str
    """path or name as vLLM takes it, or smollm2 for the embedded one; every node must be able to load it"""
    kv_cache_dtypes: Annotated[tuple[Cache, ...], Field(min_length=1)]
    """the caches compared, with options as `int8_custom:format=k6v4` or `int8_custom:layer_policy=FILE`, where the file
    is relative to the configuration; with `:kv_store=CODEC` at the end the engines share a KV store"""
    cases: Annotated[tuple[Case, ...], Field(min_length=1)]
    """the points of the sweep"""
    dataset: Dataset = Dataset.random
    """the class of vllm.benchmarks.datasets that makes the requests"""
    dataset_path: str | None = None
    """a ShareGPT-format JSON file, or for custom a JSONL file of prompts; relative to the configuration"""
    num_prefixes: Count = 1
    """different prefixes, prefix_repetition only"""
    seed: int = 0
    """of the requests and their arrival times"""
    rounds: Count = 1
    """how often everything is measured; the dtypes alternate (A B A B)"""
    warmup_requests: Annotated[int, Field(ge=0)] = 2
    """requests each engine answers before the first case, not measured"""
    replicas: Count = 1
    """engines at a time, each with its share of the requests; online: 1"""
    cpus_per_replica: Count = 1
    """cores of a replica, its own on device cpu; on device cuda per GPU"""
    tensor_parallel_size: Count = 1
    """GPUs that share a layer; more than one needs device cuda"""
    pipeline_parallel_size: Count = 1
    """groups of GPUs that share the layers; more than one needs device cuda"""
    kv_cache_seqs: Count | None = None
    """KV memory of an engine, as the number of longest requests that fit with an unquantized cache; None leaves the
    memory to engine_args"""
    kv_store_path: str | None = None
    """folder of the KV stores, on every node; None takes one beside the records, which is empty when a sweep begins and
    goes when it ends"""
    max_num_seqs: Count = 256
    """sequences that an engine may have running; it admits no more than fit into its KV memory"""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """further arguments of vllm.LLM, passed as they are"""
    goodput_ms: dict[Literal["ttft", "tpot", "e2el"], Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """the service level objective, in ms: requests that meet all of it count as goodput; online only"""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """how long placement and the start of an engine may take, each"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, case in enumerate(self.cases):
            self._check_case(case, f"cases[{index}]")
        names = [cache.name for cache in self.kv_cache_dtypes]
        for name, values in (("kv_cache_dtypes", names), ("cases", self.cases)):
            if any(value in values[:index] for index, value in enumerate(values)):
                raise ValueError(f"{name} repeats an entry: {values}")
        if self.device == Device.cpu and self.world_size > 1:
            raise ValueError(
                f"tensor_parallel_size x pipeline_parallel_size is {self.world_size}; on device cpu vLLM refuses Ray's "
                "executor, so an engine there is one replica: raise `replicas`"
            )
        if needs_path(self.dataset) != (self.dataset_path is not None):
            wanted = "needs a" if needs_path(self.dataset) else "takes no"
            raise ValueError(f"dataset {self.dataset} {wanted} dataset_path, got {self.dataset_path!r}")
        for name in self.engine_args.keys() & RESERVED_ENGINE_ARGS.keys():
            raise ValueError(f"engine_args has {name!r}; set it with the key {RESERVED_ENGINE_ARGS[name]!r}")
        for cache in self.kv_cache_dtypes:
            cache.llm_arguments(self.engine_args.get("additional_config"))  # raises if they contradict each other
        if self.kv_cache_seqs is not None and "kv_cache_memory_bytes" in self.engine_args:
            raise ValueError("kv_cache_seqs and engine_args.kv_cache_memory_bytes both set the KV memory")
        if self.kv_cache_seqs is not None and self.longest is None:
            raise ValueError("kv_cache_seqs needs engine_args.max_model_len where requests come from a file")
        if self.kv_store_path is not None and not self.has_store:
            raise ValueError(f"kv_store_path is for caches with {STORE}CODEC, of which kv_cache_dtypes has none")
        if "kv_transfer_config" in self.engine_args and self.has_store:
            raise ValueError(f"engine_args has 'kv_transfer_config', which {STORE}CODEC of a cache sets; leave out one")
        if self.mode == Mode.online and self.replicas != 1:
            raise ValueError(f"replicas must be 1 with mode online, got {self.replicas}")
        if self.mode == Mode.offline and self.goodput_ms:
            raise ValueError("goodput_ms needs mode online")
        return self

    def _check_case(self, case: Case, name: str) -> None:
        if (case.request_rate is not None) != (self.mode == Mode.online):
            wanted = "required" if self.mode == Mode.online else "not allowed"
            raise ValueError(f"{name}.request_rate is {wanted} with mode {self.mode}, got {case.request_rate}")
        if needs_path(self.dataset):
            if case.input_len is not None or case.prefix_len:
                raise ValueError(f"{name}: input_len and prefix_len are for generated requests, not for {self.dataset}")
        elif case.input_len is None or case.output_len is None:
            raise ValueError(f"{name}: dataset {self.dataset} needs input_len and output_len")
        if self.dataset == Dataset.prefix_repetition and case.num_requests % self.num_prefixes:
            raise ValueError(f"{name}.num_requests {case.num_requests} is no multiple of num_prefixes")

    @property
    def has_store(self) -> bool:
        """Whether engines of some cache share a KV store."""
        return any(STORE in cache.name for cache in self.kv_cache_dtypes)

    @property
    def world_size(self) -> int:
        """GPUs of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def longest(self) -> int | None:
        """Tokens of the longest request, output included; None if only the file knows and nothing limits it."""
        if (limit := self.engine_args.get("max_model_len")) is not None:
            return limit
        if needs_path(self.dataset):
            return None
        return max(case.prefix_len + case.input_len + case.output_len for case in self.cases)


def needs_path(dataset: Dataset) -> bool:
    """Whether the requests come from a file."""
    return dataset in (Dataset.sharegpt, Dataset.custom)


def load(path: Path) -> BenchConfig:
    """Read a configuration.

    Raises:
        ValueError: the file is no YAML mapping, or a key is unknown, missing or of the wrong type; names each.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a mapping of keys, got {type(data).__name__}")
    if isinstance(data.get("dataset_path"), str):
        data["dataset_path"] = str((path.parent / data["dataset_path"]).resolve())
    try:
        # Through JSON, where strict means what it says and a list still becomes a tuple.
        return TypeAdapter(BenchConfig).validate_json(json.dumps(data), strict=True, context={"folder": path.parent})
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_problem(item)}" for item in error.errors())) from None


def _problem(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "unexpected_keyword_argument":
        return f"unknown key {where!r}"
    return f"{where}: {item['msg']}, got {item['input']!r}"
