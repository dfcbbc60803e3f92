"""Engines for tests: started in the test process, where that takes seconds, and gone afterwards."""

import contextlib
import functools
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch

MAX_KL = 4e-3
"""Between a random model with this cache and with vLLM's own, nats per token."""

KV_CACHE_MEMORY = 48 << 20
PROMPT_LENS = (5, 33, 70, 120)


def create_config(model: Path, **options) -> "VllmConfig":  # noqa: F821
    """What `LLM(...)` does before it starts any process."""
    import vllm_int8kv

    vllm_int8kv.register()
    from vllm.engine.arg_utils import EngineArgs

    options = dict(skip_tokenizer_init=True, max_model_len=256, kv_cache_dtype="int8_custom") | options
    return EngineArgs(model=str(model), **options).create_engine_config()


@contextlib.contextmanager
def engine(model: Path, *, own_process: bool = False, **options) -> Iterator["LLM"]:  # noqa: F821
    """An engine that is gone afterwards; options are those of `LLM`."""
    from vllm import LLM
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = dict(kv_cache_dtype="int8_custom", enforce_eager=True, max_num_seqs=8, max_model_len=640)
    set_num_threads, num_threads, collect = torch.set_num_threads, torch.get_num_threads(), gc.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if own_process else "0")
        # A worker pins its process to cores and replaces this function; the other tests need both as they were.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        # vLLM collects nine times per engine; once is enough, each takes 0.3 s with all that it has imported.
        patch.setattr(gc, "collect", lambda *args: 0)
        _once_per_process(patch)
        llm = None
        try:
            llm = LLM(str(model), kv_cache_memory_bytes=KV_CACHE_MEMORY, **(defaults | options))
            yield llm
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            ensure_kv_transfer_shutdown()
            cleanup_dist_env_and_memory()
            collect()
            set_num_threads(num_threads)  # vLLM's n-gram proposer leaves another number behind


def _once_per_process(patch: pytest.MonkeyPatch) -> None:
    """Spare the second engine of a process what the first has done.

    vLLM 0.32 replaces its Triton kernels on CPU for every worker, and the second time trips over modules that
    numba has loaded meanwhile ("'_lib_fn_wrapper' object has no attribute 'get'"). And it looks at each model class
    in a process of its own, ten seconds each, lest that start CUDA.
    """
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not hasattr(platform.register_triton_kernel_overrides.__func__, "cache_info"):
        once = functools.cache(platform.register_triton_kernel_overrides.__func__)
        platform.register_triton_kernel_overrides = classmethod(once)
    lazy = registry._LazyRegisteredModel
    patch.setattr(lazy, "inspect_model_cls", lambda self: registry._ModelInfo.from_model_cls(self.load_model_cls()))


def prompt_logprobs(llm: "LLM") -> torch.Tensor:  # noqa: F821
    """[tokens, vocabulary] of random prompts in one batch, a decode step included."""
    from vllm import SamplingParams

    torch.manual_seed(1)
    tokens = [torch.randint(3, tiny_models.VOCAB_SIZE, (n,)).tolist() for n in PROMPT_LENS]
    params = SamplingParams(
        temperature=0, max_tokens=2, prompt_logprobs=-1, logprobs=-1, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": t} for t in tokens], params, use_tqdm=False)
    rows = [
        [position[token].logprob for token in range(tiny_models.VOCAB_SIZE)]
        for output in outputs
        for position in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs[:1])
    ]
    return torch.tensor(rows)


def kl_per_token(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return (expected.exp() * (expected - actual)).sum(dim=-1).mean().item()


def tiny_engine(model: Path, **options):
    return engine(model, max_model_len=256, skip_tokenizer_init=True, max_logprobs=-1, dtype="bfloat16", **options)


def layers(llm: "LLM") -> dict[int, "Attention"]:  # noqa: F821
    """The attention layers of an engine in this process, by index."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    found = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
    return {extract_layer_index(name): layer for name, layer in found.items()}


def num_cache_tokens(llm: "LLM") -> int:  # noqa: F821
    cache_config = llm.llm_engine.vllm_config.cache_config
    return cache_config.num_gpu_blocks * cache_config.block_size


def tiny_exact_engine(model: Path, **options):
    """In fp32, where greedy tokens do not depend on how vLLM batches its matrix multiplications."""
    return engine(model, max_model_len=256, skip_tokenizer_init=True, dtype="float32", **options)


def greedy_tokens(llm: "LLM", max_tokens: int = 20) -> list[list[int]]:  # noqa: F821
    """Continuations of random prompts in one batch."""
    from vllm import SamplingParams

    torch.manual_seed(1)
    prompts = [torch.randint(3, tiny_models.VOCAB_SIZE, (n,)).tolist() for n in PROMPT_LENS]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
