"""vLLM engines in processes of their own, for `vllm-int8kv demo` and `vllm-int8kv eval`.

An engine is a module run with `python -m MODULE` that reads its plan as JSON from stdin. Lines on its stdout that
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
from typing import Any, NoReturn

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
    """End the engine because what it was asked for cannot be done; `run_engine` raises the message as a ValueError."""
    emit(refused=message)
    sys.exit(1)


def finish(llm: "LLM", result: Mapping[str, Any]) -> None:  # noqa: F821
    """Send the result and end the engine: the last thing an engine process does."""
    emit(result=result)
    # Otherwise vLLM does it while Python exits, which then looks for garbage among all that vLLM has imported: 3 s
    # instead of 1.4 s, of the 20 s that a small model takes to start and end.
    llm.llm_engine.engine_core.shutdown()
    gc.freeze()


def run_engine(
    module: str,
    plan: Mapping[str, Any],
    on_progress: Callable[[str, float], None],
    verbose: bool = False,
) -> dict[str, Any]:
    """Carry out a plan in a process of its own.

    Args:
        module: what to run; it emits `stage=NAME, done=FRACTION` as it goes and `result=MAPPING` in the end.
        plan: anything JSON; its `kv_cache_dtype` and `dtype` name the engine in an error.
        on_progress: called with a stage and what is done of it.
        verbose: pass the log of vLLM on to stderr.

    Raises:
        EngineError: the process ended without a result.
        ValueError: it refused the plan.
    """
    environment = {
        # The engine in the process itself: a third of the start-up time, and every core computes (vLLM's worker
        # processes keep one core free for the scheduler, which is half of a machine with two).
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "ERROR",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-m", module]
    event, log = {}, deque(maxlen=KEPT_LOG_LINES)
    options = {"env": os.environ | environment, "preexec_fn": die_with_parent}
    with subprocess.Popen(command, text=True, errors="replace", **pipes, **options) as process:
        try:
            with contextlib.suppress(BrokenPipeError):  # it died before it read a long plan; its log says why
                json.dump(plan, process.stdin)
                process.stdin.close()
            for line in process.stdout:
                if line.startswith(EVENT):
                    event = json.loads(line.removeprefix(EVENT))
                    if "stage" in event:
                        on_progress(event["stage"], event["done"])
                else:
                    log.append(line)
                    if verbose:
                        sys.stderr.write(line)
        except BaseException:
            process.kill()
            raise
    if "refused" in event:
        raise ValueError(event["refused"])
    if process.returncode != 0 or "result" not in event:
        raise EngineError(
            f"the engine with kv_cache_dtype={plan['kv_cache_dtype']!r} and dtype={plan['dtype']!r} ended with exit "
            f"code {process.returncode}. Its last lines:\n{''.join(log)}"
        )
    return event["result"]
