"""The server of the soak, and how small its KV pool is."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS = 16, 73, 24
"""The pool holds 1152 tokens, an eighth of what as many running requests may grow to."""
MAX_MODEL_LEN = 384


class Server:
    """`vllm-int8kv serve` in a process of its own."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        options = (
            f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len {MAX_MODEL_LEN} "
            f"--max-num-seqs {MAX_NUM_SEQS} --max-num-batched-tokens 256 --block-size {BLOCK_SIZE} "
            f"--num-gpu-blocks-override {NUM_BLOCKS} --kv-cache-memory-bytes 67108864 --disable-uvicorn-access-log"
        )
        # Otherwise a small model may fill an object with white space until its tokens are spent.
        grammar = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
        command = [sys.executable, "-m", "vllm_int8kv.cli", "serve", "smollm2", *options.split(), *grammar]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def wait_until_healthy(self, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health"):
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = re.findall(r"^(vllm:\w+)\{[^}]*\} (\S+)$", response.read().decode(), re.MULTILINE)
        sums: dict[str, float] = {}
        for name, value in lines:
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def rss(self) -> int:
        parent = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
