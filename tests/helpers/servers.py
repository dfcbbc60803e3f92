"""`vllm-int8kv serve` in a process of its own, for tests."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import openai
import psutil
from processes import kill_tree, tree, wait_for

STOP_SECONDS = 60


class Server:
    """A server of SmolLM2 that has started; ends with the block.

    In fp32, which no CPU multiplies in software, unless the options say otherwise.

    Args:
        options: of `vllm-int8kv serve`, beside the model and the address.
        log: file of its output.
        environment: additional variables.
    """

    def __init__(self, options: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [sys.executable, "-m", "vllm_int8kv.commands.cli", "serve", "smollm2", "--dtype", "float32", *options]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
            )
        try:
            wait_for(self.process, log, self.is_healthy)
        except BaseException:
            kill_tree(self.process)
            raise

    def is_healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10):
                return True
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            return response.read().decode()

    def processes(self) -> list[psutil.Process]:
        """The server, its engine core and its workers."""
        return tree(self.process.pid)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            kill_tree(self.process)
