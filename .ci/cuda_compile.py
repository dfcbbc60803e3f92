"""Compile every CUDA source for every architecture and show what the kernels use.

    python .ci/cuda_compile.py                          # all architectures of a release wheel, all cache formats
    python .ci/cuda_compile.py --arch 80 90 --formats k8v8 k6v4    # a quick check
    python .ci/cuda_compile.py --keep build/cuda        # and leave the objects there, for benchmarks.cuda_static

Needs nvcc, c++filt and no GPU. Warnings are errors. Exits with 1 if a file does not compile or a hot kernel spills
registers to memory.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
FORMAT_SOURCE = SOURCES / "cuda" / "attention" / "format_kernels.cu"
"""Compiled once per cache format."""
FORMATS = [
    f"k{k}v{v}" for k, v in re.findall(r"CALL\((\d), (\d)\)", (SOURCES / "format" / "cache_format.h").read_text())
]
RELEASE_ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
HOT = ("reshape_and_cache", "decode", "per_channel", "quantize")
"""A kernel whose name contains one of these must not spill."""

FLAGS = [
    *["-std=c++20", "-O3", "-lineinfo", "-c"],
    *["--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"],
]
DTYPES = ("fp32", "fp16", "bf16")
"""As `DType` in `csrc/format/params.h` numbers them."""
ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\S+)' for 'sm_(?P<arch>\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel on one architecture; sizes in bytes."""

    name: str
    symbol: str
    arch: str
    registers: int
    static_shared: int
    stack: int
    spills: int

    @property
    def is_bad(self) -> bool:
        return self.spills > 0 and any(word in self.name for word in HOT)


@dataclass(frozen=True)
class Compiled:
    """What became of one file for one architecture."""

    kernels: list[Kernel]
    failure: str
    """the compiler's output, if it failed"""
    bytes: int


def readable(symbols: list[str]) -> list[str]:
    """`name<K8V8, 1, true>` from each mangled name: without namespaces and parameters, formats and dtypes in short."""
    demangled = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = []
    for name in demangled.splitlines():
        name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("int8kv::", "")
        name = re.sub(r"Format<Codes<(\d)>, Codes<(\d)> ?>", r"K\1V\2", name)
        name = re.sub(r"\(DType\)([012])", lambda found: DTYPES[int(found[1])], name)
        name = name.replace("(bool)1", "true").replace("(bool)0", "false").replace(" >", ">")
        names.append(name.partition("(")[0])
    return names


def parse(report: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`."""
    found = []
    for part in re.split(r"(?=Compiling entry function)", report):
        entry, spills, used = ENTRY.search(part), SPILLS.search(part), USED.search(part)
        if entry is None:
            continue
        if spills is None or used is None:
            raise ValueError(f"no resource report for {entry['symbol']} in the output of ptxas:\n{part}")
        found.append((entry, spills, used))
    names = readable([entry["symbol"] for entry, _, _ in found])
    return [
        Kernel(
            name=name,
            symbol=entry["symbol"],
            arch=entry["arch"],
            registers=int(used[1]),
            static_shared=int(used[2] or 0),
            stack=int(spills[1]),
            spills=int(spills[2]) + int(spills[3]),
        )
        for name, (entry, spills, used) in zip(names, found, strict=True)
    ]


def extra_flags(source: Path) -> list[str]:
    """As `csrc/CMakeLists.txt` has it: no contraction where the arithmetic is the cache format, or the ladder's."""
    return ["-fmad=false"] if source.parent.name in ("cache", "ladder") else []


def objects(formats: list[str]) -> dict[str, tuple[Path, list[str]]]:
    """What is compiled, by the name of the object: the source and its definitions."""
    found = {source.stem: (source, []) for source in sorted(SOURCES.glob("**/*.cu")) if source != FORMAT_SOURCE}
    for name in formats:
        found[name] = (FORMAT_SOURCE, [f"-DINT8KV_K_BITS={name[1]}", f"-DINT8KV_V_BITS={name[3]}"])
    return found


def compile_one(
    compiler: list[str], name: str, source: Path, definitions: list[str], arch: str, folder: str | Path
) -> Compiled:
    """Compile one file for one architecture, to an object in `folder` and what ptxas says of its kernels beside it."""
    command = [
        *compiler,
        *FLAGS,
        *extra_flags(source),
        *definitions,
        f"-I{SOURCES}",
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        str(source),
    ]
    object_file = Path(folder, f"{name}.{arch}.o")
    command += ["-o", str(object_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        return Compiled([], f"{' '.join(command)}\n{output}", 0)
    kernels = parse(output)
    object_file.with_suffix(".json").write_text(json.dumps([asdict(kernel) for kernel in kernels]))
    return Compiled(kernels, "", object_file.stat().st_size)


def print_table(kernels: list[Kernel]) -> None:
    print(f"{'kernel':50} {'sm':>4} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>7}")
    for k in sorted(kernels, key=lambda k: (k.name, int(re.sub(r"\D", "", k.arch)))):
        mark = "  SPILLS" if k.is_bad else ""
        print(f"{k.name:50} {k.arch:>4} {k.registers:9} {k.static_shared:7} {k.stack:6} {k.spills:7}{mark}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=RELEASE_ARCHITECTURES, help="default: %(default)s")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS, help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time, default 2")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the objects there")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc was not found: install a CUDA toolkit, 12.8 or newer", file=sys.stderr)
        return 1
    compiler = ["ccache", nvcc] if shutil.which("ccache") else [nvcc]
    os.nice(10)
    sources = objects(options.formats)
    started = time.monotonic()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    kept = contextlib.nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory()
    with kept as folder, ThreadPoolExecutor(options.jobs) as pool:
        tasks = [(name, *source, arch) for name, source in sources.items() for arch in options.arch]
        results = list(pool.map(lambda task: compile_one(compiler, *task, folder), tasks))
    kernels = [kernel for result in results for kernel in result.kernels]
    print_table(kernels)
    failures = [result.failure for result in results if result.failure]
    print(*failures, sep="\n", end="", file=sys.stderr)
    bad = [kernel for kernel in kernels if kernel.is_bad]
    print(
        f"{len(sources)} files x {len(options.arch)} architectures, {sum(r.bytes for r in results) / 1e6:.1f} MB in "
        f"{time.monotonic() - started:.0f} s: {len(failures)} failed to compile, {len(bad)} hot kernels spill"
    )
    return 1 if failures or bad else 0


if __name__ == "__main__":
    sys.exit(main())
