"""New weights in a running engine: whatever way they come, it answers as an engine that was started with them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from engines import (
    MAX_KL,
    PROMPT_LENS,
    greedy_tokens,
    kl_per_token,
    layers,
    prompt_logprobs,
    tiny_engine,
    tiny_exact_engine,
)
from safetensors.torch import load_file
from support import supports

from benchmarks.accuracy import stress_model

pytestmark = pytest.mark.engine
DIRECTIONS = [("clean", "stressed"), ("stressed", "clean"), ("clean", "other")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama, the same with outliers in the keys of two layers, and another model with outliers.

    The first two answer alike, and even write the same cache once their keys are equalized.
    """
    clean, stressed, another, other = (tmp_path_factory.mktemp("models") / str(index) for index in range(4))
    tiny_models.llama(clean)
    tiny_models.llama(another, seed=1)
    stress_model.make_stress_model(clean, stressed, 128, layers=(0, 2))
    stress_model.make_stress_model(another, other, 128, layers=(0, 1))
    return {"clean": clean, "stressed": stressed, "other": other}


def weights_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


def model_of(llm: "LLM") -> torch.nn.Module:  # noqa: F821
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def factors_of(llm: "LLM") -> dict[int, torch.Tensor]:  # noqa: F821
    return {index: layer.impl.key_transform.equalizer for index, layer in layers(llm).items()}


@pytest.fixture(scope="module", autouse=True)
def weights_in_place() -> Iterator[None]:
    """On CPU vLLM packs matrices and drops the weights, so that nothing but a checkpoint could be loaded again.

    Here they stay as they are, as on a GPU.
    """
    from vllm.model_executor.layers import utils

    def keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)
        yield


@pytest.fixture(scope="module")
def fresh(models) -> dict[str, tuple]:
    """Answers, factors and parameters of engines that were started with each of the models."""
    found = {}
    for name, folder in models.items():
        with tiny_exact_engine(folder) as llm:
            parameters = {name: value.clone() for name, value in model_of(llm).named_parameters()}
            factors = {index: equalizer.clone() for index, equalizer in factors_of(llm).items()}
            found[name] = greedy_tokens(llm), factors, parameters
    assert (found["stressed"][1][0] / found["clean"][1][0] == 128).any()
    return found


def from_path(llm, folder, parameters):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def from_checkpoint(llm, folder, parameters):
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_of(folder)})


def in_kernel_format(llm, folder, parameters):
    options = {"weights_iterator": iter(parameters.items()), "is_checkpoint_format": False}
    with torch.no_grad():
        llm.collective_rpc("reload_weights", kwargs=options)


def by_the_model_itself(llm, folder, parameters):
    """As trainers do that reach into the workers."""
    llm.apply_model(lambda model: sorted(model.load_weights(weights_of(folder))))


def by_hand(llm, folder, parameters):
    def copy(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name])

    llm.apply_model(copy)


@supports("reload of other weights", "the same tokens and key factors as an engine that starts with them")
@pytest.mark.parametrize("load", [from_path, from_checkpoint, in_kernel_format, by_the_model_itself, by_hand])
@pytest.mark.parametrize(("before", "after"), DIRECTIONS, ids=["to_outliers", "from_outliers", "to_another_model"])
def test_factors_follow_the_weights(load: Callable, before, after, models, fresh):
    tokens, factors, parameters = fresh[after]
    with tiny_exact_engine(models[before], block_size=32) as llm:
        assert greedy_tokens(llm) == fresh[before][0]  # these blocks stay in the prefix cache
        tensors = factors_of(llm)
        load(llm, models[after], parameters)
        for index, factor in factors_of(llm).items():
            assert factor is tensors[index]  # CUDA graphs know its address
            assert torch.equal(factor, factors[index])
            assert factor is layers(llm)[index].int8kv_key_equalizer  # what sleep mode saves and writes back
        assert greedy_tokens(llm) == tokens
        cached = [output.num_cached_tokens for output in generate(llm)]
        assert sum(cached) > 0  # of blocks written since


def generate(llm: "LLM") -> list:  # noqa: F821
    from vllm import SamplingParams

    torch.manual_seed(1)
    prompts = [torch.randint(3, tiny_models.VOCAB_SIZE, (n,)).tolist() for n in PROMPT_LENS]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)


def test_dummy_weights_first(models, fresh):
    """How trainers start an engine."""
    tokens, factors, _ = fresh["stressed"]
    with tiny_exact_engine(models["stressed"], load_format="dummy") as llm:
        from_checkpoint(llm, models["stressed"], None)
        assert all(torch.equal(factor, factors[index]) for index, factor in factors_of(llm).items())
        assert greedy_tokens(llm) == tokens


def test_the_same_weights_keep_the_prefix_cache(models, fresh):
    with tiny_exact_engine(models["clean"], block_size=32) as llm:
        generate(llm)
        from_path(llm, models["clean"], None)
        assert sum(output.num_cached_tokens for output in generate(llm)) > 0


def test_running_requests_go_on_with_the_new_weights(models, fresh):
    """What they have in the cache was written with the old factors, so that it must be computed again."""
    from vllm import SamplingParams

    torch.manual_seed(1)
    prompt = torch.randint(3, tiny_models.VOCAB_SIZE, (70,)).tolist()

    def run(llm, tokens: list[int], num_steps: int, max_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request("0", {"prompt_token_ids": tokens}, params)
        return [step(llm) for _ in range(num_steps)][-1]

    def step(llm) -> list[int]:
        outputs = llm.llm_engine.step()
        return list(outputs[0].outputs[0].token_ids) if outputs else []

    with tiny_exact_engine(models["clean"]) as llm:
        begun = run(llm, prompt, num_steps=6, max_tokens=16)
        assert len(begun) >= 5
        from_path(llm, models["other"], None)
        finished = begun
        while llm.llm_engine.has_unfinished_requests():
            finished = step(llm) or finished
    assert len(finished) == 16 and finished[: len(begun)] == begun
    with tiny_exact_engine(models["other"]) as llm:
        rest = run(llm, prompt + begun, num_steps=1, max_tokens=16 - len(begun))
        while llm.llm_engine.has_unfinished_requests():
            rest = step(llm) or rest
    assert finished[len(begun) :] == rest


def test_ranks_in_processes_of_their_own_follow_too(models, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with tiny_engine(models["stressed"], kv_cache_dtype="auto") as llm:
        expected = prompt_logprobs(llm)
    with tiny_engine(models["clean"], own_process=True, tensor_parallel_size=2) as llm:
        from_path(llm, models["stressed"], None)
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


def test_attention_sinks_follow_in_place(tmp_path):
    old, new = tiny_models.gpt_oss(tmp_path / "old"), tiny_models.gpt_oss(tmp_path / "new", seed=1)
    with tiny_engine(new) as llm:
        expected = {index: layer.impl.sinks.clone() for index, layer in layers(llm).items()}
        parameters = {name: value.clone() for name, value in model_of(llm).named_parameters()}
    with tiny_engine(old) as llm:
        tensors = {index: layer.impl.sinks for index, layer in layers(llm).items()}
        assert not torch.equal(tensors[0], expected[0])
        in_kernel_format(llm, new, parameters)  # vLLM 0.32 does not find the sinks of a checkpoint again
        for index, layer in layers(llm).items():
            assert layer.impl.sinks is tensors[index]
            assert torch.equal(layer.impl.sinks, expected[index])


def test_with_lora_the_factors_are_those_of_the_model_alone(models, fresh, tmp_path):
    from lora_adapter import LORA_RANK, write_adapter
    from vllm.lora.request import LoRARequest

    with tiny_exact_engine(models["clean"], enable_lora=True, max_lora_rank=LORA_RANK) as llm:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": list(range(3, 90))}
        request = LoRARequest("adapter", 1, str(write_adapter(tmp_path)))
        llm.generate(prompt, params, lora_request=request, use_tqdm=False)
        from_path(llm, models["stressed"], None)
        factors = fresh["stressed"][1]
        assert all(torch.equal(factor, factors[index]) for index, factor in factors_of(llm).items())


def test_nothing_is_found_while_weights_arrive(models):
    """Between the start and the end of a weight update a model is half old and half new."""
    from vllm_int8kv.serving import calibration

    with tiny_exact_engine(models["clean"]) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        model_of(llm).load_weights(weights_of(models["stressed"]))
        assert calibration.has_new_weights(worker)
        worker._weight_update_active = True
        assert not calibration.has_new_weights(worker)
        worker._weight_update_active = False
        llm.collective_rpc("check_health")  # the first call after the end of the update
        assert not calibration.has_new_weights(worker)
