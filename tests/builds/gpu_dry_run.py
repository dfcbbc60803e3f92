"""Every call of `benchmarks.gpu` from end to end on a CPU, with stubs in place of what only a GPU machine has.

    make gpu-dry-run                                              all calls, seven engines of SmolLM2 among them
    make gpu-dry-run DRY_RUN="--calls kernels part"               some of them

The GPU's tools are `StubGpu`, the driver for compute-sanitizer runs on the emulated kernels, and what travels is a
small folder in small parts. Exits with 1 if a step did not pass or more lies in a folder than may come back.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import emulated_cuda
from stub_gpu import StubGpu

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts
from benchmarks.gpu.calls import CALLS, DRIVER, KERNELS, KIT, PARTS, SITE
from benchmarks.gpu.parts import MANIFEST, Manifest

ROOT = Path(__file__).resolve().parents[2]
GPU = [sys.executable, "-m", "benchmarks.gpu"]
COMMIT = "0123456789ab"
PART_BYTES = 1 << 20
NUM_BYTES = 3 << 20
"""Of random bytes, which are as large in parts."""


def make_wheel(folder: Path) -> Path:
    """A wheel with one module, as pip takes it."""
    path = folder / "int8kv_stand_in-1-py3-none-any.whl"
    info = "int8kv_stand_in-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("int8kv_stand_in.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: int8kv-stand-in\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def make_kit(kit: Path) -> None:
    """What `make gpu-kit` makes, small and without the driver."""
    (kit / KERNELS).mkdir(parents=True)
    make_wheel(kit / KERNELS)
    tree = kit / "tree"
    (tree / "packages").mkdir(parents=True)
    (tree / "packages" / "__init__.py").write_text("ARRIVED = True\n")
    (tree / "packages" / "data").write_bytes(os.urandom(NUM_BYTES))
    Manifest(COMMIT, parts.cut(tree, kit / PARTS, PART_BYTES)).save(kit)
    shutil.rmtree(tree)


def make_driver(folder: Path) -> Path:
    kernels = emulated_cuda.build("g++", folder, emulated_cuda.DRIVER_FORMATS)
    place = folder / "driver"
    place.mkdir()
    return emulated_cuda.build_driver("g++", kernels, place)


def run_calls(kit: Path, folder: Path, environment: dict[str, str], names: list[str]) -> bool:
    """Each call as it is typed; whether all of them passed and what they left may come back."""
    is_good = True
    for name, number, _ in gpu.schedule(kit):
        if name not in names:
            continue
        out = folder / "out" / (name if number is None else f"{name}-{number}")
        command = [*GPU, "run", name, "--device", "cpu", "--kit", str(kit)]
        command += [] if number is None else ["--number", str(number)]
        command += ["--store", str(folder / "store")]
        done = subprocess.run(command, cwd=ROOT, env=environment | {"OUT": str(out)})
        is_good &= done.returncode == 0
        files = [path for path in out.rglob("*") if path.is_file()]
        is_good &= 0 < len(files) <= gpu.MAX_FILES
        if done.returncode:
            print(*(path.read_text(errors="replace")[-4000:] for path in out.glob("*.log")), sep="\n")
    return is_good


def print_sizes(kit: Path) -> None:
    """Of what would travel from here, if `make gpu-kit` has been run."""
    if not (kit / MANIFEST).is_file():
        print("sizes of the real parts: run `make gpu-kit` first")
        return
    for _, _, brings in gpu.schedule(kit):
        for path in brings:
            files = [kit / path] if (kit / path).is_file() else (kit / path).glob("*")
            for file in files:
                print(f"{file.stat().st_size / gpu.MIB:7.1f} MiB  {file.relative_to(kit)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS), help="default: all")
    names = parser.parse_args().calls
    os.nice(10)
    with tempfile.TemporaryDirectory(prefix="gpu-dry-run-") as name:
        folder = Path(name)
        make_kit(folder / "kit")
        if "kernels" in names:
            print("compiling the kernels for the emulator", flush=True)
            shutil.copy2(make_driver(folder), folder / "kit" / KERNELS / DRIVER)
        environment = StubGpu(folder / "bin").environment(busy_looks=2)
        subprocess.run([*GPU, "list", "--kit", str(folder / "kit")], cwd=ROOT, check=True)
        is_good = run_calls(folder / "kit", folder, environment, names)
        if {"part", "answers"} <= set(names):
            arrived = folder / "store" / SITE / "packages" / "data"
            is_good &= arrived.is_file() and arrived.stat().st_size == NUM_BYTES
    print_sizes(KIT)
    print("every call ran" if is_good else "not every call ran")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
