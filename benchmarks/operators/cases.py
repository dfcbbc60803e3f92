"""What `kernels.py` measures."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from benchmarks.operators.peers import Peer, RaggedShape, Shape
from vllm_int8kv.evaluation.record import Device


class What(StrEnum):
    decode = "decode"
    verify = "verify"
    write = "write"
    prefill = "prefill"
    isa = "isa"
    """decode, with the kernels for older CPUs too"""
    formats = "formats"
    """decode and prefill with fewer bits"""
    write_formats = "write_formats"
    """write with fewer bits"""
    fp32 = "fp32"
    """decode and prefill of a model in fp32"""

    @property
    def writes(self) -> bool:
        """Whether the cache update is timed, not attention."""
        return self in (What.write, What.write_formats)


@dataclass(frozen=True)
class Case:
    """A measurement: attention over a batch or, for a write, the cache update of its last `query_len` tokens."""

    what: What
    shape: Shape


GQA_4 = Shape(num_seqs=1, seq_len=4096, query_len=1, num_heads=32, num_kv_heads=8, head_size=128)
SMOLLM2 = replace(GQA_4, num_heads=9, num_kv_heads=3, head_size=64)


def every_case() -> Iterator[Case]:
    """The shapes of the published tables, losses included."""
    for num_queries_per_kv in (1, 3, 4, 8):
        num_kv_heads = 3 if num_queries_per_kv == 3 else 8
        for head_size in (64, 128):
            for seq_len in (512, 4096, 16384):
                for num_seqs in (1, 8, 32):
                    num_heads = num_kv_heads * num_queries_per_kv
                    yield Case(What.decode, Shape(num_seqs, seq_len, 1, num_heads, num_kv_heads, head_size))
    for num_seqs in (1, 8):
        yield Case(What.isa, replace(GQA_4, num_seqs=num_seqs))
    for model in (replace(GQA_4, num_heads=8), GQA_4, SMOLLM2):
        yield Case(What.formats, replace(model, num_seqs=8))
        yield Case(What.formats, replace(model, seq_len=2048, query_len=2048))
    yield Case(What.formats, replace(GQA_4, num_heads=64, num_seqs=8))
    for model in (GQA_4, SMOLLM2):
        for num_seqs in (8, 32):
            yield Case(What.write_formats, replace(model, num_seqs=num_seqs, seq_len=100))
        yield Case(What.write_formats, replace(model, seq_len=2048, query_len=2048))
    for model in (GQA_4, SMOLLM2):
        for num_seqs in (1, 8):
            yield Case(What.verify, replace(model, num_seqs=num_seqs, query_len=4))
        for num_seqs in (1, 8, 32):  # one token each, at the end of 100
            yield Case(What.write, replace(model, num_seqs=num_seqs, seq_len=100))
        for num_tokens in (512, 4096):
            yield Case(What.write, replace(model, seq_len=num_tokens, query_len=num_tokens))
        for num_tokens in (512, 1024, 2048, 4096):
            yield Case(What.prefill, replace(model, seq_len=num_tokens, query_len=num_tokens))
        wide = replace(model, dtype="float32")
        for num_seqs in (1, 8):
            yield Case(What.fp32, replace(wide, num_seqs=num_seqs))
        for num_tokens in (512, 2048):
            yield Case(What.fp32, replace(wide, seq_len=num_tokens, query_len=num_tokens))


GPU_MODELS = {
    "Llama-3.1-8B": replace(GQA_4, block_size=16),
    "Qwen2.5-7B": replace(GQA_4, num_heads=28, num_kv_heads=4, block_size=16),
    "Llama-3.1-70B, one of eight GPUs": replace(GQA_4, num_heads=8, num_kv_heads=1, block_size=16),
    "Gemma-2-9B": replace(GQA_4, num_heads=16, num_kv_heads=8, head_size=256, block_size=16),
}
MAX_GPU_TOKENS = 1 << 20
"""Of a batch: 4 GB of bf16 keys and values with 8 heads of 128."""


def gpu_cases() -> Iterator[Case]:
    """Models by context and batch; the first one also writes, verifies and prefills. The most telling come first."""
    model, *others = GPU_MODELS.values()
    yield from _gpu_decode(model)
    for num_seqs, longest in ((8, 32768), (64, 16384)):
        sizes = asdict(replace(model, num_seqs=num_seqs, seq_len=longest))
        yield Case(What.decode, RaggedShape(**sizes, shortest=256))
    for num_seqs in (1, 8):
        for query_len in (4, 8):
            yield Case(What.verify, replace(model, num_seqs=num_seqs, seq_len=32768, query_len=query_len))
    for num_tokens in (1, 64, 256):  # one token each, at the end of 100
        yield Case(What.write, replace(model, num_seqs=num_tokens, seq_len=100))
    for num_tokens in (2048, 8192):
        yield Case(What.write, replace(model, seq_len=num_tokens, query_len=num_tokens))
        yield Case(What.prefill, replace(model, seq_len=num_tokens, query_len=num_tokens))
    yield Case(What.prefill, replace(model, seq_len=32768, query_len=2048))  # the last chunk of a long prompt
    for other in others:
        yield from _gpu_decode(other)
    for seq_len in (8192, 32768):
        for num_seqs in (1, 8):  # blocks as xFormers wants them
            yield Case(What.decode, replace(model, num_seqs=num_seqs, seq_len=seq_len, block_size=64))


def _gpu_decode(model: Shape) -> Iterator[Case]:
    for seq_len in (1024, 8192, 32768, 131072):
        for num_seqs in (1, 8, 64, 256):
            if num_seqs * seq_len <= MAX_GPU_TOKENS:
                yield Case(What.decode, replace(model, num_seqs=num_seqs, seq_len=seq_len))


def quick_cases() -> Iterator[Case]:
    """One of each kind."""
    yield Case(What.decode, replace(GQA_4, num_seqs=8))
    yield Case(What.decode, replace(SMOLLM2, seq_len=512))
    yield Case(What.verify, replace(SMOLLM2, query_len=4))
    yield Case(What.write, replace(GQA_4, num_seqs=8, seq_len=100))
    yield Case(What.write_formats, replace(SMOLLM2, num_seqs=8, seq_len=100))
    yield Case(What.prefill, replace(SMOLLM2, seq_len=512, query_len=512))
    yield Case(What.fp32, replace(SMOLLM2, seq_len=512, dtype="float32"))


def bytes_moved(case: Case, peer: Peer) -> int | None:
    """Bytes a perfect implementation of the format moves; None for prefill, which arithmetic bounds."""
    shape = case.shape
    slot = shape.num_kv_heads * peer.slot_bytes(shape.head_size)
    if case.what == What.prefill or (case.what in (What.fp32, What.formats) and shape.query_len > 1):
        return None
    if case.what.writes:
        fresh = 2 * shape.num_kv_heads * shape.head_size * shape.torch_dtype.itemsize
        return shape.num_tokens * (fresh + slot)
    return sum(shape.seq_lens) * slot


def choose_cases(device: Device, quick: bool, first_model: bool = False) -> list[Case]:
    """The shapes of a run.

    Args:
        first_model: on a GPU those of the first of the models only, where there are minutes.
    """
    if quick:
        return list(quick_cases())
    if device == Device.cpu:
        return list(every_case())
    first = next(iter(GPU_MODELS.values()))
    return [case for case in gpu_cases() if not first_model or _heads(case.shape) == _heads(first)]


def _heads(shape: Shape) -> tuple[int, int, int]:
    return shape.num_heads, shape.num_kv_heads, shape.head_size


def batch_text(case: dict) -> str:
    """The batch of a kernel case in words."""
    text = f"{case['num_seqs']} x {case['seq_len']:,}"
    if "shortest" in case:
        return f"{case['num_seqs']} x {case['shortest']:,} to {case['seq_len']:,}"
    return text if case["query_len"] in (1, case["seq_len"]) else f"{text}, {case['query_len']:,} fresh"
