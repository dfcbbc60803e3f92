"""Programs by the names of a GPU's tools, for runs without one: `nvidia-smi`, `compute-sanitizer` and `ncu`."""

import os
import sys
from pathlib import Path

NVIDIA_SMI = """#!/bin/sh
# Busy for as many looks as the file beside it says, then idle.
looks="$(dirname "$0")/busy_looks"
left=$(cat "$looks")
case "$*" in
  *--query-compute-apps*)
    if [ "$left" -gt 0 ]; then echo $((left - 1)) > "$looks"; echo "4711, another program"; fi ;;
  *--query-gpu=utilization.gpu*) echo 0 ;;
  *) echo "GPU 0: stub" ;;
esac
"""
WRAPPER = """#!{python}
# Runs the program after its own options; those that have a value are the ones that are used here.
import os, sys

options, program = {options}, sys.argv[1:]
while program and program[0].startswith("-"):
    if program[0] == "--log-file":
        open(program[1], "w").write("a profile\\n")
    program = program[2 if program[0] in options else 1 :]
print("{name} stands in for", *program, flush=True)
os.execvp(program[0], program)
"""
OPTIONS = {
    "compute-sanitizer": ["--tool", "--error-exitcode"],
    "ncu": ["--set", "--clock-control", "--page", "--log-file"],
}
"""Of each tool those that take a value."""


class StubGpu:
    """Writes the programs into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._write("nvidia-smi", NVIDIA_SMI)
        for name, options in OPTIONS.items():
            self._write(name, WRAPPER.format(python=sys.executable, name=name, options=options))

    def environment(self, busy_looks: int = 0) -> dict[str, str]:
        """That of this process with the programs first; for the next looks another program uses the GPU."""
        (self._folder / "busy_looks").write_text(str(busy_looks))
        return os.environ | {"PATH": os.pathsep.join([str(self._folder), os.environ["PATH"]])}

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.write_text(text)
        path.chmod(0o755)
