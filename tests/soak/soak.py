"""Soak: the OpenAI server under more load than its KV pool holds, every answer checked.

    python tests/soak/soak.py --minutes 30 --connections 200 --record benchmarks/results

SmolLM2 in fp32 with prefix caching, prompts of every length modulo the block size, and requests of all kinds at once:
whole and streamed, aborted mid-stream, n > 1, stop strings, logprobs, JSON schemas. What must hold:

* lost: no request fails or gets no answer.
* corrupt: every guided answer is an object of its schema; no stop string in a text; logprobs finite and at most 0.
* differences: a greedy answer equals the one its prompt got alone on the idle server, in the same process. The bits
  of our attention do not depend on batch, chunking or prefix hits, but those of vLLM's matrix multiplications depend
  on the shape of the batch, and a key that lies beside a tie of the quantizer then gets another code. So an answer may
  part from the other only at a token where the two best lay less than `NOISE` nats apart on the idle server; that is
  counted as explained, everything else is an error. Up to there the logprobs of the two differ by less than `NOISE`.
* memory: of all processes together, flat after the first half.
* no request has a `seed`: vLLM 0.32 on CPU dies of one whose prompt takes more than one step, with any cache
  (`Generator.set_offset` is for GPUs only, `_bookkeeping_sync` calls it on CPU too).
* the server's log has no error, and afterwards the pool is empty.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import openai
import typer

sys.path.insert(0, str(Path(__file__).parent))
from server import BLOCK_SIZE, SoakServer

ROOT = Path(__file__).resolve().parents[2]
ANSWER_TOKENS = 16
NOISE = {"int8_custom": 0.05, "int8_custom:format=k6v4": 0.3}
"""By cache, how far a logprob may move with the batch, in nats. The whole cache of 8 bits moves it by about 0.02
(sqrt(2 KL), KL 2e-4 per token), k6v4 by 0.12, and so far do other roundings of the matmuls that flip codes: 0.0185 at
most in half an hour of load with 8 bits."""
MAX_GROWTH = 0.03
"""Growth of the memory of all processes from the third to the last quarter of the run."""
MAX_FIRST_GROWTH = 0.15
"""The same within the first minutes, in which allocators still take what they will keep: 4.5% on a busy machine."""
FIRST_SECONDS = 300
REQUEST_SECONDS = 600
STOP = " coins"
SCHEMA = {
    "type": "object",
    "properties": {"item": {"type": "integer", "minimum": 0, "maximum": 99}, "sold": {"type": "boolean"}},
    "required": ["item", "sold"],
    "additionalProperties": False,
}
KINDS = {"whole": 6, "stream": 4, "abort": 2, "n": 2, "stop": 2, "logprobs": 2, "json": 2}
"""Kinds of requests and how often each comes."""


@dataclass
class Idle:
    """What a prompt got alone on the idle server."""

    tokens: list[str]
    logprobs: list[float]
    gaps: list[float]
    """per token, by how many nats it beat the second best"""

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def gap_where_it_parts(self, text: str) -> float:
        common = next((i for i, (a, b) in enumerate(zip(self.text, text, strict=False)) if a != b), len(text))
        seen = 0
        for token, gap in zip(self.tokens, self.gaps, strict=True):
            seen += len(token)
            if seen > common:
                return gap
        return float("inf")

    def noise(self, tokens: list[str], logprobs: list[float]) -> float:
        """The largest difference of logprobs of the tokens before an answer parts from this one."""
        noise = 0.0
        for mine, theirs, a, b in zip(self.tokens, tokens, self.logprobs, logprobs, strict=False):
            if mine != theirs:
                break
            noise = max(noise, abs(a - b))
        return noise


@dataclass
class Result:
    cache: str = "int8_custom"
    """a key of `NOISE`"""
    requests: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    compared: int = 0
    explained: int = 0
    noise: float = 0.0
    """largest difference of a logprob from the idle server's, in nats"""
    output_tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    """seconds"""
    rss: list[int] = field(default_factory=list)
    """bytes of all processes of the server"""
    usage: list[float] = field(default_factory=list)
    """share of the KV pool in use"""
    seconds: float = 0.0
    """of load"""
    metrics: dict[str, float] = field(default_factory=dict)
    log_errors: list[str] = field(default_factory=list)

    def rss_quarter(self, index: int) -> float:
        size = len(self.rss) // 4
        return statistics.median(self.rss[index * size : (index + 1) * size])

    def problems(self) -> list[str]:
        """What makes the soak fail; empty if nothing does."""
        found = [f"lost: {x}" for x in self.lost] + [f"corrupt: {x}" for x in self.corrupt]
        found += [f"difference: {x}" for x in self.unexplained] + [f"log: {x}" for x in self.log_errors]
        allowed = NOISE[self.cache]
        if not self.noise < allowed:
            found.append(f"a logprob differs by {self.noise:.2g} nats from the idle server's, allowed {allowed}")
        growth = self.rss_quarter(3) / self.rss_quarter(2) - 1
        if growth > (MAX_GROWTH if self.seconds > FIRST_SECONDS else MAX_FIRST_GROWTH):
            found.append(f"memory grew by {growth:.1%} from the third to the last quarter")
        if self.metrics["vllm:num_preemptions_total"] == 0:
            found.append("nothing was preempted: the pool was never full")
        if self.metrics["vllm:kv_cache_usage_perc"] != 0 or self.metrics["vllm:num_requests_running"] != 0:
            found.append(f"the pool is not empty after the last request: {self.metrics}")
        if missing := KINDS.keys() - self.requests.keys():
            found.append(f"no request of kind {sorted(missing)} ended")
        return found


def make_prompts(per_length: int) -> list[list[int]]:
    """`per_length` of each length modulo the block size; neighbours share a prefix."""
    from transformers import AutoTokenizer

    from vllm_int8kv.commands.models import smollm2

    text = " ".join(f"Item {i} costs {i * 7 % 50} coins." for i in range(60))
    tokens = AutoTokenizer.from_pretrained(smollm2())(text)["input_ids"]
    return [tokens[8 * (i // 4) :][: 24 + 7 * i] for i in range(per_length * BLOCK_SIZE)]


async def ask_idle(client: openai.AsyncOpenAI, prompt: list[int]) -> Idle:
    answer = await client.completions.create(
        model="smollm2", prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    gaps = []
    for top in logprobs.top_logprobs:
        best, second = sorted(top.values(), reverse=True)[:2]
        gaps.append(best - second)
    return Idle(logprobs.tokens, logprobs.token_logprobs, gaps)


async def request(
    client: openai.AsyncOpenAI, kind: str, prompt: list[int], idle: Idle, rng: random.Random, result: Result
) -> None:
    """One request of a kind, its answer checked."""
    common = dict(model="smollm2", prompt=prompt, temperature=0, max_tokens=ANSWER_TOKENS)
    create = client.completions.create
    where = f"{kind}, {len(prompt)} tokens"
    text = None
    if kind in ("stream", "abort"):
        stream, pieces = await create(**common, stream=True), []
        async for chunk in stream:
            pieces.append(chunk.choices[0].text if chunk.choices else "")
            if kind == "abort" and len(pieces) == 1 + rng.randrange(ANSWER_TOKENS // 2):
                await stream.close()
                break
        text = "".join(pieces) if kind == "stream" else None
        result.output_tokens += len(pieces)
    elif kind == "json":
        schema = {"structured_outputs": {"json": SCHEMA}}
        answer = await create(**common | {"max_tokens": 48}, extra_body=schema)
        try:
            value = json.loads(answer.choices[0].text)
            valid = value.keys() == {"item", "sold"} and type(value["item"]) is int and type(value["sold"]) is bool
        except ValueError:
            valid = False
        if not valid:
            result.corrupt.append(f"{where}: {answer.choices[0].text!r}")
    else:
        options = {
            "whole": {},
            "n": dict(n=2, temperature=0.8, max_tokens=6 * ANSWER_TOKENS),
            "stop": dict(stop=STOP),
            "logprobs": dict(logprobs=3),
        }[kind]
        answer = await create(**common | options)
        choices = answer.choices
        if kind == "n" and len(choices) != 2:
            result.corrupt.append(f"{where}: {len(choices)} answers")
        if kind == "stop" and STOP in choices[0].text:
            result.corrupt.append(f"{where}: {choices[0].text!r}")
        if kind == "logprobs" and not all(-1e9 < x <= 0 for x in choices[0].logprobs.token_logprobs):
            result.corrupt.append(f"{where}: {choices[0].logprobs.token_logprobs}")
        if kind == "logprobs":
            noise = idle.noise(choices[0].logprobs.tokens, choices[0].logprobs.token_logprobs)
            result.noise = max(result.noise, noise)
        text = choices[0].text if kind in ("whole", "logprobs") else None
        result.output_tokens += answer.usage.completion_tokens
    if text is not None:
        result.compared += 1
        if text != idle.text:
            gap = idle.gap_where_it_parts(text)
            if gap < NOISE[result.cache]:
                result.explained += 1
            else:
                result.unexplained.append(f"{where}: {text!r} instead of {idle.text!r}, gap {gap:.2g}")


async def load(server: SoakServer, minutes: float, connections: int, per_length: int, seed: int = 0) -> Result:
    """Learn the idle answers, then keep `connections` requests in flight."""
    result, prompts = Result(server.cache, seconds=60 * minutes), make_prompts(per_length)
    limits = openai.DefaultAsyncHttpxClient(limits=openai.DEFAULT_CONNECTION_LIMITS, timeout=REQUEST_SECONDS)
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=limits)
    idle = [await ask_idle(client, prompt) for prompt in prompts]
    deadline = time.monotonic() + result.seconds

    async def connection(number: int) -> None:
        rng = random.Random(f"{seed}-{number}")
        while time.monotonic() < deadline:
            (kind,) = rng.choices(list(KINDS), KINDS.values())
            index = rng.randrange(len(prompts))
            start = time.monotonic()
            try:
                await request(client, kind, prompts[index], idle[index], rng, result)
            except (openai.OpenAIError, OSError) as error:
                result.lost.append(f"{kind}, {len(prompts[index])} tokens: {error!r}")
                await asyncio.sleep(1)
                continue
            result.requests[kind] += 1
            result.latencies.append(time.monotonic() - start)

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            metrics = await asyncio.to_thread(server.metric_sums)
            result.usage.append(metrics["vllm:kv_cache_usage_perc"])
            result.rss.append(server.rss())

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(connection(number) for number in range(connections)))
    watcher.cancel()
    await asyncio.sleep(2)
    result.metrics = server.metric_sums()
    await client.close()
    return result


def run(minutes: float, connections: int, log: Path, per_length: int = 2, cache: str = "int8_custom") -> Result:
    """Start a server, load it with `make_prompts(per_length)`, stop it."""
    with SoakServer(log, cache) as server:
        result = asyncio.run(load(server, minutes, connections, per_length))
        # Before the server is stopped: vLLM's front end may log the end of its own engine as an error.
        result.log_errors = [
            line for line in log.read_text(errors="replace").splitlines() if " ERROR " in line or "Traceback" in line
        ]
    return result


def main(
    minutes: Annotated[float, typer.Option(help="length of the load")] = 30,
    connections: Annotated[int, typer.Option(help="requests in flight")] = 200,
    cache: Annotated[str, typer.Option(help="int8_custom or int8_custom:format=k6v4")] = "int8_custom",
    record: Annotated[Path | None, typer.Option(help="folder to append the record soak.jsonl to")] = None,
) -> None:
    """Run the soak; exit with 1 and say why if something went wrong."""
    from soak_record import summary, write

    from vllm_int8kv.evaluation.record import environment

    environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    if cache not in NOISE:
        raise typer.BadParameter(f"expected one of {', '.join(NOISE)}, got {cache!r}", param_hint="--cache")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.txt")
        try:
            result = run(minutes, connections, log, cache=cache)
        except OSError as error:
            errors = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
            sys.exit("\n".join([f"the server is gone: {error}; the first errors of its log:", *errors[:10]]))
    print(json.dumps(summary(result), indent=1))
    if problems := result.problems():
        sys.exit("\n".join(problems[:20]) + f"\n{len(problems)} problems")
    if record is not None:
        write(result, minutes, connections, record)


if __name__ == "__main__":
    typer.run(main)
