"""Scoring a text through vLLM: what runs inside its worker, and the requests that make it run.

Decode steps are scored by a logits processor, which also makes the request say the given text; prefill by the
log-probabilities that vLLM computes for `prompt_logprobs`, taken before all but a few of them are dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import pairwise

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import ModelConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_int8kv.cache.formats import native_content_bytes
from vllm_int8kv.evaluation.scoring import Recorder, TextFiles

OPTIONS = {
    "logits_processors": [f"{__name__}:ForcedDecoding"],
    "worker_extension_cls": f"{__name__}.PromptScoring",
}
"""What `LLM` needs for everything in this module."""


@lru_cache(maxsize=64)
def _recorder(scores_path: str) -> Recorder:
    return Recorder(_files[scores_path])


_files: dict[str, TextFiles] = {}


def recorder(files: TextFiles) -> Recorder:
    """The recorder of a text, opened once per process."""
    if _files.get(files.scores_path) != files:
        _files[files.scores_path] = files
        _recorder.cache_clear()
    return _recorder(files.scores_path)


class ForcedDecoding(AdapterLogitsProcessor):
    """Makes a request say a given text and scores what the model would rather have said.

    For requests with `extra_args["forced_text"]`: `files`, the fields of a `TextFiles`; `first_row`, the row that
    the first decode step computes.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable | None:
        forced = (params.extra_args or {}).get("forced_text")
        if forced is None:
            return None
        text, first_row = recorder(TextFiles(**forced["files"])), forced["first_row"]

        def record_and_force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            row = first_row + len(output_ids)
            text.record(row, torch.log_softmax(logits.float(), dim=-1)[None].cpu().numpy())
            forced_logits = torch.full_like(logits, -torch.inf)
            forced_logits[text.files.token_ids[row + 1]] = 0.0
            return forced_logits

        return record_and_force


class PromptScoring:
    """Extension of vLLM's worker, for `LLM.collective_rpc`."""

    def score_next_prompt(self, files: dict, chunk_tokens: int) -> None:
        """Score the rows of the next prompt from its prefill; it must be alone and ask for `prompt_logprobs`.

        Raises:
            RuntimeError: during the prefill, if a chunk has more than `chunk_tokens` tokens.
        """
        sampler, text, row = self.model_runner.sampler, recorder(TextFiles(**files)), 0
        compute_logprobs = type(sampler).compute_logprobs

        def record(logits: torch.Tensor) -> torch.Tensor:
            nonlocal row
            if len(logits) > chunk_tokens:
                raise RuntimeError(f"a chunk of {len(logits)} tokens instead of {chunk_tokens} at most")
            log_probs = compute_logprobs(logits)
            text.record(row, log_probs.cpu().numpy())
            row += len(log_probs)
            return log_probs

        # vLLM calls it for every chunk of such a prompt, in order, and, without `logprobs`, for nothing else. What it
        # returns to the client instead are Python objects, one per token and vocabulary entry.
        sampler.compute_logprobs = record


def kv_cache_memory_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Memory in which `num_tokens` fit with `kv_cache_dtype="auto"`; every cache dtype gets the same."""
    heads = config.get_total_num_kv_heads() * config.get_total_num_hidden_layers()
    return heads * native_content_bytes(config.get_head_size(), config.dtype.itemsize) * num_tokens


def steps(llm: LLM) -> Iterator[list[RequestOutput]]:
    """Run the engine until no request is left; yields the outputs of each step."""
    while llm.llm_engine.has_unfinished_requests():
        yield llm.llm_engine.step()


def forced_params(files: TextFiles, begin: int, end: int) -> SamplingParams:
    """Say tokens `begin` to `end - 1` of a text and score the rows before them."""
    forced = {"files": asdict(files), "first_row": begin - 1}
    return SamplingParams(
        temperature=0.0,
        max_tokens=end - begin,
        ignore_eos=True,
        detokenize=False,
        extra_args={"forced_text": forced},
    )


def score_decode(llm: LLM, texts: Sequence[TextFiles], num_parts: int, on_progress: Callable[[float], None]) -> None:
    """Score every token of the texts by decode steps.

    A text is cut into `num_parts` parts, or as many as it has rows, that are decoded side by side, each after the text
    before it, so that every row but the first of a part comes from a decode step that reads the whole context from the
    cache.
    """
    for index, files in enumerate(texts):
        parts = min(num_parts, files.num_rows)
        bounds = [1 + files.num_rows * part // parts for part in range(parts + 1)]
        for begin, end in pairwise(bounds):
            prompt = {"prompt_token_ids": files.token_ids[:begin]}
            llm.llm_engine.add_request(f"text-{index}-{begin}", prompt, forced_params(files, begin, end))
    num_rows, num_done = sum(files.num_rows for files in texts), {}
    for outputs in steps(llm):
        num_done |= {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
        on_progress(sum(num_done.values()) / num_rows)


def score_prefill(
    llm: LLM, texts: Sequence[TextFiles], on_progress: Callable[[float], None], chunks: Sequence[int] | None = None
) -> None:
    """Score every token of the texts by their prefill, one text at a time.

    In chunks of `max_num_batched_tokens`, or of what `chunks` says for the text if that is fewer. The engine must run
    in this process.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    budget = scheduler.max_num_scheduled_tokens
    try:
        for index, (files, chunk) in enumerate(zip(texts, chunks or [budget] * len(texts), strict=True)):
            # The budget of a step, which vLLM takes from its options. Its limit for long prompts leaves those alone
            # that have no others beside them.
            scheduler.max_num_scheduled_tokens = chunk_tokens = min(chunk, budget)
            llm.collective_rpc("score_next_prompt", args=(asdict(files), chunk_tokens))
            llm.generate({"prompt_token_ids": files.token_ids}, params, use_tqdm=False)
            on_progress((index + 1) / len(texts))
    finally:
        scheduler.max_num_scheduled_tokens = budget


def score_prefix_reads(
    llm: LLM, texts: Sequence[TextFiles], strides: Sequence[int], on_progress: Callable[[float], None]
) -> float:
    """Score tokens of the texts by a request for each that finds the text before it in the prefix cache.

    Args:
        strides: of each text; every so many tokens are scored.

    Returns:
        The share of the prompt tokens that were read from the prefix cache.
    """
    num_cached = num_prompt = 0
    for index, (files, stride) in enumerate(zip(texts, strides, strict=True)):
        llm.generate({"prompt_token_ids": files.token_ids[:-1]}, SamplingParams(max_tokens=1), use_tqdm=False)
        ends = range(stride, len(files.token_ids), stride)
        prompts = [{"prompt_token_ids": files.token_ids[:end]} for end in ends]
        params = [forced_params(files, end, end + 1) for end in ends]
        for output in llm.generate(prompts, params, use_tqdm=False):
            num_cached += output.num_cached_tokens
            num_prompt += len(output.prompt_token_ids)
        on_progress((index + 1) / len(texts))
    return num_cached / num_prompt
