"""vLLM engines in processes of their own, for `vllm-int8kv demo`, `eval` and `tune`.

An engine is a module run with `python -m MODULE` that reads what to do as JSON from stdin. Lines on its stdout that
start with `EVENT` go on with one JSON object for the parent; every other line is the log of vLLM.
"""

import contextlib
import ctypes
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

EVENT = "@vllm-int8kv "
KEPT_LOG_LINES = 40
PR_SET_PDEATHSIG = 1


class EngineError(RuntimeError):
    """An engine failed; the message ends with its last words."""

    @property
    def last_line(self) -> str:
        """What the engine said last: of an exception, its type and message."""
        return re.sub(r"^\[rank\d+\]: ", "", str(self).rstrip().rsplit("\n", 1)[-1])  # PyTorch's excepthook adds it


def die_with_parent() -> None:
    """For `subprocess.Popen(preexec_fn=...)`: the kernel sends the child SIGTERM when its parent dies, however."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def emit(**event: object) -> None:
    """Send one event to the parent."""
    print(EVENT + json.dumps(event), flush=True)


def refuse(message: str) -> NoReturn:
    """End the engine because what it was asked for cannot be done; the parent raises the message as a ValueError."""
    emit(refused=message)
    sys.exit(1)


def finish(llm: "LLM", result: Mapping[str, Any]) -> None:  # noqa: F821
    """Send the result and end the engine: the last thing an engine process does."""
    emit(result=result)
    # Otherwise vLLM does it while Python exits, which then looks for garbage among all that vLLM has imported: 3 s
    # instead of 1.4 s, of the 20 s that a small model takes to start and end.
    llm.llm_engine.engine_core.shutdown()
    gc.freeze()


class EngineProcess:
    """An engine in a process of its own, as a context manager.

    Args:
        module: what to run. It reads messages from its stdin, one JSON object per line; for each it emits
            `stage=NAME, done=FRACTION` as it goes and `result=MAPPING` in the end.
        name: what an error calls it.
        on_progress: called with a stage and what is done of it.
        verbose: pass the log of vLLM on to stderr.
    """

    def __init__(
        self, module: str, name: str, on_progress: Callable[[str, float], None], verbose: bool = False
    ) -> None:
        self._module, self._name, self._on_progress, self._verbose = module, name, on_progress, verbose
        self._log: deque[str] = deque(maxlen=KEPT_LOG_LINES)

    def __enter__(self) -> Self:
        environment = {
            # The engine in the process itself: a third of the start-up time, and every core computes (vLLM's worker
            # processes keep one core free for the scheduler, which is half of a machine with two).
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "INFO" if self._verbose else "ERROR",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options = {"env": os.environ | environment, "preexec_fn": die_with_parent}
        command = [sys.executable, "-m", self._module]
        self._process = subprocess.Popen(command, text=True, errors="replace", **pipes, **options)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._process:
            self._end_messages()
            if kind is not None:
                self._process.kill()
                return
            for line in self._process.stdout:
                self._keep(line)
        if self._process.returncode:
            raise self._failure()

    def ask(self, message: Mapping[str, Any], *, is_last: bool = False) -> dict[str, Any]:
        """Send a message and wait for the result.

        Raises:
            EngineError: the process ended without a result.
            ValueError: it refused the message.
        """
        with contextlib.suppress(BrokenPipeError):  # it died before it read a long message; its log says why
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        if is_last:
            self._end_messages()
        for line in self._process.stdout:
            if not line.startswith(EVENT):
                self._keep(line)
                continue
            event = json.loads(line.removeprefix(EVENT))
            if "stage" in event:
                self._on_progress(event["stage"], event["done"])
            elif "refused" in event:
                raise ValueError(event["refused"])
            else:
                return event["result"]
        self._process.wait()
        raise self._failure()

    def _end_messages(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _keep(self, line: str) -> None:
        self._log.append(line)
        if self._verbose:
            sys.stderr.write(line)

    def _failure(self) -> EngineError:
        return EngineError(
            f"{self._name} ended with exit code {self._process.returncode}. Its last lines:\n{''.join(self._log)}"
        )


def run_engine(
    module: str,
    plan: Mapping[str, Any],
    on_progress: Callable[[str, float], None],
    verbose: bool = False,
) -> dict[str, Any]:
    """Carry out a plan in a process of its own.

    Args:
        module: what to run; it reads one message, the plan, till the end of its stdin.
        plan: anything JSON; its `kv_cache_dtype` and `dtype` name the engine in an error.
        on_progress, verbose: as of `EngineProcess`.

    Raises:
        EngineError: the process ended without a result.
        ValueError: it refused the plan.
    """
    name = f"the engine with kv_cache_dtype={plan['kv_cache_dtype']!r} and dtype={plan['dtype']!r}"
    with EngineProcess(module, name, on_progress, verbose) as engine:
        return engine.ask(plan, is_last=True)
