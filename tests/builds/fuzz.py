"""Long fuzzing of the operators under AddressSanitizer and UndefinedBehaviorSanitizer, recorded.

    python tests/builds/fuzz.py --examples 20000 --record benchmarks/results

Runs `test_fuzz.py` on the instrumented kernels (`sanitize.py`). What it counts goes into `fuzz.jsonl` if all is well.
"""

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import sanitize
import typer
from emulate_isas import is_needed

COUNTS = "FUZZ_COUNTS"
"""Environment variable with the file for the counts."""


def pytest_sessionfinish() -> None:
    """As a pytest plug-in (`-p fuzz`): write what came of the calls, and on which kernels."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for (operator, outcome), count in sorted(sys.modules["test_fuzz"].OUTCOMES.items()):
        found[operator][outcome] = count
    isas = sys.modules["test_fuzz"].library.cpu_isas()
    Path(os.environ[COUNTS]).write_text(json.dumps({"isas": isas, "operators": found}))


def main(
    examples: Annotated[int, typer.Option(help="of each property")] = 20_000,
    record: Annotated[Path | None, typer.Option(help="folder to append the record fuzz.jsonl to")] = None,
) -> None:
    """Fuzz; exit with 1 if something was found."""
    from vllm_int8kv.evaluation.record import environment

    environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.json")
        variables = {"FUZZ_EXAMPLES": str(examples), COUNTS: str(counts)}
        arguments = ["-q", "-p", "fuzz", "-o", "timeout=0", "tests/operators/test_fuzz.py"]
        start = time.monotonic()
        if sanitize.run(arguments, variables) != 0:
            sys.exit(1)
        seconds, found = time.monotonic() - start, json.loads(counts.read_text())
    print(json.dumps(found, indent=1))
    if record is not None:
        write(found["isas"], found["operators"], examples, seconds, record)


def write(isas: list[str], found: dict[str, dict[str, int]], examples: int, seconds: float, results: Path) -> None:
    """Append the record of a run that found nothing."""
    from vllm_int8kv.evaluation import record
    from vllm_int8kv.evaluation.record import summarize

    line = record.of_run(
        record.environment(),
        what="fuzz",
        case={"examples": examples, "sanitizers": "address, undefined", "emulated": is_needed()},
        impl="int8_custom",
        resolved_backend=f"INT8_KV {', '.join(isas)}",
        metrics=found,
        num_threads=1,
        **asdict(summarize([seconds * 1e6], cpu_us=0.0)) | {"cpu_per_wall": None},
    )
    record.append(line, results)


if __name__ == "__main__":
    typer.run(main)
