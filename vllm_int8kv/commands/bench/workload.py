"""The requests of a case, made by vLLM's own `vllm.benchmarks.datasets`, as token ids."""

from dataclasses import dataclass
from typing import Any

from vllm_int8kv.commands.bench.config import BenchConfig, Case, Dataset


@dataclass(frozen=True)
class Request:
    """One prompt; it is answered with exactly `output_len` tokens."""

    request_id: str
    prompt_token_ids: list[int]
    output_len: int


def sample(config: BenchConfig, case: Case, tokenizer: Any, seed: int) -> list[Request]:
    """The requests of a case: the same for every call with the same arguments.

    Raises:
        ValueError: the file has too few usable requests, or one exceeds `max_model_len`.
    """
    samples = make(config, case, tokenizer, seed)
    if len(samples) != case.num_requests:
        raise ValueError(f"dataset {config.dataset} has {len(samples)} usable requests, expected {case.num_requests}")
    # Generated text may come back as a few tokens more than it was made from.
    limit = None if case.input_len is None else case.prefix_len + case.input_len
    requests = [
        Request(f"{index:06d}", tokenizer(request.prompt).input_ids[:limit], request.expected_output_len)
        for index, request in enumerate(samples)
    ]
    longest = max(len(request.prompt_token_ids) + request.output_len for request in requests)
    if config.longest is not None and longest > config.longest:
        raise ValueError(f"a request has {longest} tokens with its output, but max_model_len is {config.longest}")
    return requests


def make(config: BenchConfig, case: Case, tokenizer: Any, seed: int) -> list:
    """The same as vLLM's `SampleRequest`s, prompts as text."""
    from vllm.benchmarks import datasets  # slow to import

    common = {"tokenizer": tokenizer, "num_requests": case.num_requests, "output_len": case.output_len}
    match config.dataset:
        case Dataset.random:
            dataset = datasets.RandomDataset(random_seed=seed)
            return dataset.sample(**common, input_len=case.input_len, prefix_len=case.prefix_len)
        case Dataset.prefix_repetition:
            dataset = datasets.PrefixRepetitionRandomDataset(random_seed=seed)
            lengths = {"prefix_len": case.prefix_len, "suffix_len": case.input_len}
            return dataset.sample(**common, **lengths, num_prefixes=config.num_prefixes)
        case Dataset.sharegpt:
            dataset = datasets.ShareGPTDataset(dataset_path=config.dataset_path, random_seed=seed)
            return dataset.sample(**common, no_oversample=True)
        case Dataset.custom:
            dataset = datasets.CustomDataset(dataset_path=config.dataset_path, random_seed=seed)
            return dataset.sample(**common, no_oversample=True, skip_chat_template=True)


def shares(requests: list[Request], count: int) -> list[list[Request]]:
    """Deal requests to `count` replicas, so that shares differ by one request at most."""
    return [requests[index::count] for index in range(count)]


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model as vLLM takes it."""
    from vllm.tokenizers import get_tokenizer

    from vllm_int8kv.commands.models import resolve

    return get_tokenizer(resolve(model))
