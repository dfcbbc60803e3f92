"""Features of vLLM together with the INT8 cache, each a row of the support table in tests/README.md.

Engines in fp32 must give the same greedy tokens as one that does without the feature; where the feature changes the
answer itself, the measure is the KL divergence to vLLM's own cache, as in `test_engine.py`.
"""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engines
import pytest
import tiny_models
import torch
from engines import (
    MAX_KL,
    PROMPT_LENS,
    engine,
    greedy_tokens,
    kl_per_token,
    layers,
    num_cache_tokens,
    prompt_logprobs,
    tiny_engine,
    tiny_exact_engine,
)
from lora_adapter import LORA_RANK, write_adapter
from servers import Server
from support import refuses, supports

from vllm_int8kv.commands import models

pytestmark = pytest.mark.engine

FAMILIES = [
    pytest.param(model, marks=supports(feature, "KL to vLLM's own cache"), id=model.__name__)
    for model, feature in [
        (tiny_models.qwen2, "Qwen2: biases on Q, K and V"),
        (tiny_models.qwen3, "Qwen3: Q and K normalized"),
        (tiny_models.phi, "Phi: RoPE on part of the head"),
        (tiny_models.opt, "OPT: learned positions"),
        (tiny_models.bloom, "BLOOM: ALiBi"),
        (tiny_models.gemma3n, "Gemma-3n: layers that share a KV cache"),
        (tiny_models.lfm2, "LFM2: hybrid of attention and convolution states"),
    ]
]


@pytest.mark.parametrize("model", FAMILIES)
def test_model_family_is_close_to_auto(model, tmp_path):
    model(tmp_path)
    with tiny_engine(tmp_path, kv_cache_dtype="auto") as llm:
        expected, auto_tokens = prompt_logprobs(llm), num_cache_tokens(llm)
    with tiny_engine(tmp_path) as llm:
        assert {layer.attn_backend.get_name() for layer in layers(llm).values()} == {"INT8_KV"}
        assert num_cache_tokens(llm) / auto_tokens >= 1.9
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected_tokens(llama: Path) -> list[list[int]]:
    with tiny_exact_engine(llama) as llm:
        return greedy_tokens(llm)


@supports("speculative decoding, n-gram", "the same tokens as without")
def test_ngram_speculation(llama, expected_tokens):
    speculative = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
    with tiny_exact_engine(llama, speculative_config=speculative) as llm:
        assert greedy_tokens(llm) == expected_tokens


@supports("speculative decoding, draft model with either cache dtype", "the same tokens as without")
@pytest.mark.parametrize("draft_dtype", [None, "auto", "int8_custom"])
def test_draft_model_speculation(draft_dtype, llama, expected_tokens):
    speculative = dict(model=str(llama), num_speculative_tokens=3, kv_cache_dtype=draft_dtype)
    with tiny_exact_engine(llama, speculative_config=speculative, disable_log_stats=False) as llm:
        assert greedy_tokens(llm) == expected_tokens
        accepted = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"]
    assert sum(accepted) > 0  # the draft is the model itself: its guesses are right


def test_a_policy_is_about_the_target_and_not_about_its_draft(llama, expected_tokens, tmp_path):
    """A policy may name layers that a draft does not have, and says nothing of those that it has."""
    draft = tiny_models.llama(tmp_path, num_layers=1)
    policy = {"int8_kv": {"layer_policy": {0: "auto", 2: "auto"}}}
    with tiny_exact_engine(llama, additional_config=policy) as llm:
        alone = greedy_tokens(llm)
    for draft_dtype, backend in ((None, None), ("auto", None), ("auto", "CPU_ATTN")):
        speculative = dict(model=str(draft), num_speculative_tokens=2, kv_cache_dtype=draft_dtype)
        speculative |= {} if backend is None else {"attention_backend": backend}
        with tiny_exact_engine(llama, additional_config=policy, speculative_config=speculative) as llm:
            context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            names = {name: layer.attn_backend.get_name() for name, layer in context.items() if "attn" in name}
            assert greedy_tokens(llm) == alone
        of_target = {f"model.layers.{layer}.self_attn.attn": "CPU_ATTN" for layer in (0, 2)}
        of_target["model.layers.1.self_attn.attn"] = "INT8_KV"
        of_draft = {"draft_model.model.layers.0.self_attn.attn": "CPU_ATTN" if draft_dtype else "INT8_KV"}
        assert names == of_target | of_draft


@supports("checkpoints with scales of an FP8 cache, per head too", "the same tokens as without")
def test_the_scales_of_a_checkpoint_are_not_needed(llama, expected_tokens, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    scheme = dict(num_bits=8, type="float", strategy="attn_head", symmetric=True, dynamic=False)
    config["quantization_config"] = dict(
        quant_method="compressed-tensors", format="dense", config_groups={}, kv_cache_scheme=scheme, ignore=[]
    )
    (folder / "config.json").write_text(json.dumps(config))
    with tiny_exact_engine(folder) as llm:
        assert greedy_tokens(llm) == expected_tokens


@supports("KV connectors that copy whole blocks", "saved by one engine, loaded by another: the same tokens")
def test_one_engine_loads_what_another_saved(llama, expected_tokens, tmp_path, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector

    loaded: list[str] = []
    load_file = example_connector.safetensors.torch.load_file
    monkeypatch.setattr(
        example_connector.safetensors.torch, "load_file", lambda name: loaded.append(name) or load_file(name)
    )
    connector = dict(kv_connector="ExampleConnector", kv_role="kv_both")
    connector["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}
    options = dict(block_size=16, enable_prefix_caching=False, enable_chunked_prefill=False)
    options |= dict(kv_transfer_config=connector, max_num_batched_tokens=2048)
    with tiny_exact_engine(llama, **options) as llm:
        assert greedy_tokens(llm) == expected_tokens
    (folder,) = tmp_path.iterdir()  # of engines whose pages mean the same
    assert len(list(folder.glob("*/*.safetensors"))) >= 3 * sum(n > 16 for n in PROMPT_LENS)  # of 3 layers
    with tiny_exact_engine(llama, **options) as llm:
        loaded.clear()
        assert greedy_tokens(llm) == expected_tokens
    # The connector looks for one block too few where a prompt ends one token into a block.
    assert len(loaded) == 3 * sum(n > 16 and n % 16 != 1 for n in PROMPT_LENS)
    # Pages that were written with other options are not there for an engine.
    for additional_config in ({"rotate_keys": False}, {"layer_policy": {1: "auto"}}):
        changed = options | {"additional_config": {"int8_kv": additional_config}, "block_size": 32}
        with tiny_exact_engine(llama, **changed) as llm:
            loaded.clear()
            greedy_tokens(llm)
            assert loaded == []
    assert len(list(tmp_path.iterdir())) == 3


@supports("LoRA on Q, K and V", "KL to vLLM's own cache")
def test_lora(llama, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(write_adapter(tmp_path)))
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    torch.manual_seed(1)
    prompts = [{"prompt_token_ids": torch.randint(3, tiny_models.VOCAB_SIZE, (n,)).tolist()} for n in PROMPT_LENS]

    def log_probs(llm, **options) -> torch.Tensor:
        outputs = llm.generate(prompts, params, use_tqdm=False, **options)
        rows = [output.outputs[0].logprobs[0] for output in outputs]
        return torch.tensor([[row[token].logprob for token in range(tiny_models.VOCAB_SIZE)] for row in rows])

    options = dict(enable_lora=True, max_lora_rank=LORA_RANK, max_logprobs=-1)
    with tiny_exact_engine(llama, kv_cache_dtype="auto", **options) as llm:
        expected = log_probs(llm, lora_request=request)
    with tiny_exact_engine(llama, **options) as llm:
        adapted, plain = log_probs(llm, lora_request=request), log_probs(llm)
    assert kl_per_token(expected, adapted) < MAX_KL
    assert kl_per_token(plain, adapted) > 100 * MAX_KL  # the prefix cache did not mix them up


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "year": {"type": "integer", "maximum": 9999}},
    "required": ["city", "year"],
    "additionalProperties": False,
}


@supports("structured output (JSON schema)", "every answer is an object of the schema")
def test_structured_output():
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    questions = ["Name a city and a year as JSON.", "Paris in JSON?", "When was Rome founded? JSON."]
    params = SamplingParams(temperature=0, max_tokens=80, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    with engine(models.smollm2(), dtype="float32") as llm:
        outputs = llm.chat([[{"role": "user", "content": q}] for q in questions], params, use_tqdm=False)
    for output in outputs:
        answer = json.loads(output.outputs[0].text)
        assert sorted(answer) == ["city", "year"] and isinstance(answer["year"], int)


@supports("data parallel behind the server", "both engines answer, and as one does alone")
def test_data_parallel_server(tmp_path):
    prompts = ["a b c d e f g", "1 2 3 4 5"] * 4
    options = "--enforce-eager --max-model-len 256 --max-num-seqs 4 --kv-cache-memory-bytes 67108864"
    with Server(
        [*options.split(), "--data-parallel-size", "2", "--api-server-count", "1"], tmp_path / "log.txt"
    ) as server:

        def complete(prompt: str) -> str:
            answer = server.client().completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=4)
            return answer.choices[0].text

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(complete, prompts))
        served = re.findall(r'^vllm:prompt_tokens_total\{engine="(\d)".*\} ([1-9])', server.metrics(), re.MULTILINE)
    assert answers == [" h i j k", " 6 7"] * 4, answers
    assert {engine for engine, _ in served} == {"0", "1"}


@supports("pooling with a decoder (embeddings)", "cosine to vLLM's own cache above 0.999")
def test_decoder_as_an_embedding_model():
    def embeddings(kv_cache_dtype: str) -> torch.Tensor:
        options = dict(runner="pooling", dtype="float32", kv_cache_dtype=kv_cache_dtype)
        with engine(models.smollm2(), **options) as llm:
            outputs = llm.embed(["Hello", "What is the capital of France? " * 20], use_tqdm=False)
            return torch.tensor([output.outputs.embedding for output in outputs])

    similarity = torch.nn.functional.cosine_similarity(embeddings("auto"), embeddings("int8_custom"))
    assert (similarity > 0.999).all()


# Refusals: what `LLM(...)` says before it starts a process.


@pytest.fixture(scope="module")
def create_config(llama: Path) -> Callable[..., object]:
    def create(model: Path = llama, **options):
        return engines.create_config(model, **options)

    return create


@refuses("KV connectors that copy single slots (LMCache), or are not known to copy whole blocks", "by this plugin")
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in_a_multi_connector"])
def test_unknown_connector_is_refused(wrapped, create_config):
    connector = dict(kv_connector="DecodeBenchConnector", kv_role="kv_both")
    if wrapped:
        known = connector | {"kv_connector": "OffloadingConnector"}
        connector = dict(kv_connector="MultiConnector", kv_role="kv_both") | {
            "kv_connector_extra_config": {"connectors": [known, connector]}
        }
    with pytest.raises(ValueError, match=r"kv_connector='DecodeBenchConnector' \(.*the bytes of a slot lie in several"):
        create_config(kv_transfer_config=connector)


@refuses("vLLM's example connector with tensor parallel or chunked prefill", "by this plugin: it corrupts any KV cache")
def test_the_example_connector_is_refused_where_it_corrupts(create_config):
    options = {"kv_transfer_config": dict(kv_connector="ExampleConnector", kv_role="kv_both")}
    whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048}
    create_config(**options, **whole_prompts)
    with pytest.raises(ValueError, match="ExampleConnector with chunked prefill: it saves a prompt with its first"):
        create_config(**options)
    with pytest.raises(ValueError, match="ExampleConnector with tensor_parallel_size=2: its ranks overwrite each"):
        create_config(**options, **whole_prompts, tensor_parallel_size=2)


@refuses("Falcon", "by this plugin: vLLM's code of the model does not hand the KV cache dtype to its layers")
def test_a_model_whose_layers_are_not_told_is_refused(tmp_path):
    expected = (
        r"kv_cache_dtype='int8_custom' would be used by no layer of FalconForCausalLM \(vLLM's code of this model does "
        r"not hand the KV cache dtype to them: transformer\.h\.0\.self_attention\.attn, .*\); use "
        "kv_cache_dtype='auto'"
    )
    with pytest.raises(ValueError, match=expected), tiny_engine(tiny_models.falcon(tmp_path)):
        pass


@refuses("pipeline parallel on CPU", "vLLM 0.32 loses requests between stages with any cache dtype")
def test_pipeline_parallel_is_refused_on_cpu(create_config):
    with pytest.raises(ValueError, match="pipeline_parallel_size=2: on CPU the scheduler of vLLM"):
        create_config(pipeline_parallel_size=2)


@refuses("sleep mode on CPU", "by vLLM")
def test_sleep_mode_is_refused_on_cpu(create_config):
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        create_config(enable_sleep_mode=True)


@refuses("offloading of the KV cache to CPU memory, on CPU", "by vLLM")
def test_cpu_offloading_is_refused_on_cpu(llama):
    connector = dict(kv_connector="OffloadingConnector", kv_role="kv_both")
    connector["kv_connector_extra_config"] = {"cpu_bytes_to_use": 1 << 20}
    with (
        pytest.raises(Exception, match="CPU Offloading is currently only supported on CUDA-alike and XPU GPUs"),
        tiny_exact_engine(llama, kv_transfer_config=connector),
    ):
        pass


@refuses("data parallel in one `LLM`", "by vLLM, which has it for servers and for one process per rank")
def test_data_parallel_in_one_process_is_refused(llama):
    with (
        pytest.raises(ValueError, match=r"LLM\(data_parallel_size=2\) is not supported"),
        tiny_exact_engine(llama, data_parallel_size=2),
    ):
        pass


@refuses("DeepSeek-V2 and later: MLA", "by this plugin")
def test_mla_is_refused(create_config, tmp_path):
    with pytest.raises(ValueError, match="MLA not supported"):
        create_config(tiny_models.deepseek_v2(tmp_path))


@refuses("encoders (BERT)", "by this plugin; they have no KV cache")
def test_encoder_is_refused(create_config, tmp_path):
    with pytest.raises(ValueError, match="attention type encoder_only not supported"):
        create_config(tiny_models.bert(tmp_path))


@refuses(
    "multimodal models whose images attend to themselves in full (PaliGemma)",
    'by this plugin; accepted without images (`limit_mm_per_prompt={"image": 0}`)',
)
def test_bidirectional_images_are_refused(create_config, tmp_path):
    model = tiny_models.paligemma(tmp_path)
    with pytest.raises(ValueError, match="partial multimodal token full attention not supported"):
        create_config(model)
    assert create_config(model, limit_mm_per_prompt={"image": 0}).cache_config.cache_dtype == "int8_custom"
