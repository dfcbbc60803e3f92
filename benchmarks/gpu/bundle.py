"""Makes what travels to a machine without network: the kernels, then vLLM and what it needs, in parts."""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import parts
from benchmarks.gpu.calls import DRIVER, KERNELS, PARTS, ROOT
from benchmarks.gpu.parts import Manifest, Part
from vllm_int8kv.evaluation import record

PACKAGES = Path(__file__).with_name("packages.txt")
PYTHON_VERSION = "3.12"
PLATFORM = "x86_64-manylinux_2_39"
LEFT_OUT = (
    # FlashAttention 2, MoE, other quantizations and attentions: no dense model on a Hopper GPU takes them.
    *("vllm/vllm_flash_attn/_vllm_fa2_C*", "vllm/_moe_C*", "vllm/_flashmla*", "vllm/_qutlass*", "vllm/_flashkda*"),
    *("vllm/_deepselect*", "vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100"),
    # A server in Rust, and tokenizers of models that nobody asks for.
    *("vllm/vllm-rs", "mistral_common/data"),
)
"""500 MB of the 1 GB that the packages unpack to."""


def commit() -> str:
    """The commit of the checkout.

    Raises:
        RuntimeError: files differ from it, so that no record could name what ran.
    """
    status = ["git", "-C", str(ROOT), "status", "--porcelain"]
    changes = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    if changes:
        raise RuntimeError(f"commit first, so that records name what ran; changed are:\n{changes.rstrip()}")
    return record.environment()["commit"]


def pack_kernels(kit: Path) -> list[Path]:
    """Put the newest wheel and the driver that was built with it into the kit.

    Raises:
        FileNotFoundError: they have not been built.
    """
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    drivers = sorted((ROOT / "build").glob(f"py3-*/{DRIVER}"), key=lambda path: path.stat().st_mtime)
    if not wheels or not drivers:
        raise FileNotFoundError("there is no wheel or no driver: run `make gpu-kit`")
    folder = kit / KERNELS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return [Path(shutil.copy2(path, folder)) for path in (wheels[-1], drivers[-1])]


def install(tree: Path) -> None:
    """Install the packages for the other machine's Python into a folder of this one, without what is left out.

    Raises:
        subprocess.CalledProcessError: one could not be fetched.
    """
    shutil.rmtree(tree, ignore_errors=True)
    there = ["--python-version", PYTHON_VERSION, "--python-platform", PLATFORM, "--only-binary", ":all:"]
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", *there, "--target", str(tree)]
    subprocess.run([*command, "-r", str(PACKAGES)], check=True)
    for pattern in LEFT_OUT:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def prepare(kit: Path, *, with_packages: bool) -> tuple[list[Path], list[Part]]:
    """Make the kit; returns the files of the kernels and the parts of the packages.

    Parts that were cut from the same list of packages are kept: it takes minutes to make them.
    """
    named = commit()
    files = pack_kernels(kit)
    stamp, folder = kit / "packages.txt", kit / PARTS
    cut: list[Part] = []
    if with_packages:
        if stamp.is_file() and stamp.read_bytes() == PACKAGES.read_bytes():
            cut = Manifest.load(kit).parts
        else:
            tree = kit / "tree"
            install(tree)
            cut = parts.cut(tree, folder)
            shutil.rmtree(tree)
            shutil.copy(PACKAGES, stamp)
    Manifest(named, cut).save(kit)
    return files, cut
