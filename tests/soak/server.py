"""The server of the soak, and how small its KV pool is."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from servers import Server

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS = 16, 73, 24
"""The pool holds 1152 tokens, an eighth of what as many running requests may grow to."""
MAX_MODEL_LEN = 384


class SoakServer(Server):
    """A server whose pool is always full."""

    def __init__(self, log: Path, cache: str = "int8_custom") -> None:
        self.cache = cache
        options = (
            f"--enforce-eager --max-model-len {MAX_MODEL_LEN} --max-num-seqs {MAX_NUM_SEQS} "
            f"--max-num-batched-tokens 256 --block-size {BLOCK_SIZE} --num-gpu-blocks-override {NUM_BLOCKS} "
            "--kv-cache-memory-bytes 67108864 --disable-uvicorn-access-log"
        )
        # Otherwise a small model may fill an object with white space until its tokens are spent.
        grammar = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
        super().__init__(["--kv-cache-dtype", cache, *options.split(), *grammar], log)

    def metric_sums(self) -> dict[str, float]:
        """By name, over all labels."""
        sums: dict[str, float] = {}
        for name, value in re.findall(r"^(vllm:\w+)\{[^}]*\} (\S+)$", self.metrics(), re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def rss(self) -> int:
        return sum(process.memory_info().rss for process in self.processes())
