"""How the plugin enters vLLM: registration, refusals at start-up, and every upstream symbol it leans on."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import tiny_models
import torch

import vllm_int8kv
from vllm_int8kv.config import Int8KVConfig
from vllm_int8kv.serving import backend, lifecycle, plugin

ROOT = Path(vllm_int8kv.__file__).parents[1]
VLLM_033 = "vllm==0.33.0"
OTHER_CACHE = "use kv_cache_dtype='auto'"


def run_python(code: str, **env: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Registration.

REGISTER_TWICE = """
import sys
import vllm_int8kv
vllm_int8kv.register()
vllm_int8kv.register()
from vllm.config import CacheConfig
from vllm.platforms import current_platform
print(CacheConfig(cache_dtype="int8_custom").cache_dtype)
print(CacheConfig(cache_dtype="fp8").cache_dtype)
try:
    CacheConfig(cache_dtype="int8_costum")
except ValueError as error:
    print("int8_costum refused, int8_custom offered:", "int8_custom" in str(error))
print("kernels loaded:", "vllm_int8kv.serving.backend" in sys.modules)
wrapper = type(current_platform).get_attn_backend_cls.__func__
print("wrapped twice:", any(getattr(c.cell_contents, "is_int8kv_wrapper", False) for c in wrapper.__closure__))
"""
REGISTERED = [
    "int8_custom",
    "fp8",
    "int8_costum refused, int8_custom offered: True",
    "kernels loaded: False",
    "wrapped twice: False",
]


def test_registers_in_a_fresh_process_and_twice():
    assert run_python(REGISTER_TWICE).splitlines() == REGISTERED


def test_vllm_finds_the_plugin_after_its_own_imports_and_its_command_line_offers_it():
    code = """
from typing import get_args
from vllm.engine import arg_utils
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention import selector
print("int8_custom" in arg_utils.get_kwargs(arg_utils.CacheConfig)["cache_dtype"]["choices"])
parser = arg_utils.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
print(parser.parse_args(["--kv-cache-dtype", "int8_custom"]).kv_cache_dtype, get_args(selector.CacheDType)[-1])
"""
    assert run_python(code).split() == ["False", "int8_custom", "int8_custom"]


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "dev"])
def test_another_vllm_version_is_named(version, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    expected = f"vLLM {version} is installed, this vllm-int8kv supports 0.32 to 0.33; install one of those"
    with pytest.raises(plugin.UnsupportedVLLMError, match=re.escape(expected)):
        plugin.vllm_version()


def test_another_vllm_version_works_on_without_the_plugin():
    code = """
import vllm
vllm.__version__ = "0.34.0"
import vllm_int8kv
vllm_int8kv.register()
from vllm.config import CacheConfig
print(CacheConfig().cache_dtype)
try:
    CacheConfig(cache_dtype="int8_custom")
except ValueError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["auto", "refused"]
    assert "kv_cache_dtype='int8_custom' is not available: vLLM 0.34.0 is installed" in done.stdout + done.stderr


def test_a_missing_symbol_is_named():
    with pytest.raises(
        plugin.UnsupportedVLLMError, match=r"has no vllm\.config\.cache:NoSuchThing .*install a released"
    ):
        plugin.resolve("vllm.config.cache:NoSuchThing")


# Contract with upstream.


MODULES = {"vllm.benchmarks:datasets", "vllm.benchmarks:serve"}
"""What is imported from its package as a whole."""


def imported_symbols(path: Path) -> set[str]:
    """`module:name` of everything a file imports from vLLM, inside functions too."""
    found = {
        f"{node.module}:{name.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vllm"
        for name in node.names
    }
    # A module has become an attribute of its package only once something has imported it.
    return {f"{symbol.replace(':', '.')}:__name__" if symbol in MODULES else symbol for symbol in found}


SOURCES = [
    *Path(vllm_int8kv.__file__).parent.rglob("*.py"),
    *(path for path in (ROOT / "benchmarks").rglob("*.py") if path.name != "cuda_peers.py"),  # for GPUs alone
]
GPU_IMPORTS = {
    f"vllm.v1.attention.backends.fa_utils:{name}" for name in ("flash_attn_varlen_func", "get_flash_attn_version")
}
"""What the CPU build of vLLM does not have and varlen_attention.py does without."""
OFFICIAL_IMPORTS = {"vllm.config.cache:get_kv_cache_dtype_handler", "vllm.config.cache:register_kv_cache_dtype"}
OURS = ("cache_format", "of_format")
OVERRIDDEN = {
    "AttentionBackend": [name for name in vars(backend.Int8KVBackend) if not name.startswith("_") and name not in OURS],
    "AttentionMetadataBuilder": ["_cudagraph_support", "build", "supports_update_block_table", "update_block_table"],
    "AttentionImpl": ["forward", "process_weights_after_loading"],
}
USED_ATTRIBUTES = {
    "vllm.engine.arg_utils:EngineArgs.__dataclass_fields__",
    "vllm.engine.arg_utils:_compute_kwargs.cache_clear",
    "vllm.v1.attention.backend:AttentionBackend.validate_configuration",
    "vllm.v1.kv_cache_interface:AttentionSpec.page_size_bytes",
    "vllm.v1.kv_cache_interface:AttentionSpec.state_content_bytes",
    "vllm.v1.kv_cache_interface:AttentionSpec.unpadded_page_size_bytes",
    "vllm.v1.kv_cache_interface:KVCacheLayout.LBHNC",
} | {f"vllm.v1.attention.backend:{cls}.{name}" for cls, names in OVERRIDDEN.items() for name in names}
CONTRACT = sorted(
    {*plugin.COMMON_SYMBOLS, *plugin.PATCHED_SYMBOLS, *lifecycle.SYMBOLS, *USED_ATTRIBUTES}
    | {symbol for path in SOURCES for symbol in imported_symbols(path)} - OFFICIAL_IMPORTS - GPU_IMPORTS
)


@pytest.mark.parametrize("symbol", CONTRACT)
def test_upstream_still_has(symbol):
    plugin.resolve(symbol)


# Refusals at start-up.


@pytest.fixture(scope="module")
def registered() -> None:
    vllm_int8kv.register()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


def test_mla_model_is_refused(registered, tmp_path):
    with pytest.raises(ValueError, match="MLA not supported, as its cache holds one latent vector") as caught:
        engines.create_config(tiny_models.deepseek_v2(tmp_path))
    assert OTHER_CACHE in str(caught.value)


def test_unsupported_head_size_is_refused(registered, tmp_path):
    expected = (
        "kv_cache_dtype='int8_custom' cannot serve this model or configuration: head_size 40 not supported "
        "(supported: 32 to 256 in steps of 16, and 512); use kv_cache_dtype='auto', or leave single layers with this "
        "head size unquantized with kv_cache_dtype_skip_layers"
    )
    with pytest.raises(ValueError) as caught:
        engines.create_config(tiny_models.unsupported_head_size(tmp_path))
    assert expected in str(caught.value)


def test_unsupported_block_size_is_refused(registered, llama):
    with pytest.raises(ValueError, match="block_size 24 not supported; use a multiple of 16"):
        engines.create_config(llama, block_size=24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rotate": True},
            "additional_config[\"int8_kv\"] has no option 'rotate'; expected one of: cpu_isa, equalize_keys, "
            "format, layer_policy, rotate_keys",
        ),
        ({"rotate_keys": 1}, 'additional_config["int8_kv"]["rotate_keys"] must be bool, got 1 (int)'),
        ({"cpu_isa": True}, 'additional_config["int8_kv"]["cpu_isa"] must be str | None, got True (bool)'),
        (["rotate_keys"], "additional_config[\"int8_kv\"] must be a mapping of options, got ['rotate_keys']"),
        ({"cpu_isa": "avx10"}, 'additional_config["int8_kv"]["cpu_isa"] must be one of scalar'),
    ],
    ids=["unknown", "wrong_type", "wrong_optional_type", "no_mapping", "no_such_isa"],
)
def test_wrong_option_is_refused(options, message, registered, llama):
    with pytest.raises(ValueError) as caught:
        engines.create_config(llama, additional_config={"int8_kv": options})
    assert message in str(caught.value)


def test_layer_policy_becomes_skipped_layers(registered, llama, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("0: int8\n1: auto\n")
    options = {"int8_kv": {"layer_policy": str(policy)}}
    config = engines.create_config(llama, additional_config=options, kv_cache_dtype_skip_layers=["0"])
    assert config.cache_config.kv_cache_dtype_skip_layers == ["0", "1"]
    # Workers get the policy itself: on another machine there may be no such file, or another one.
    policy.unlink()
    assert Int8KVConfig.from_additional_config(config.additional_config).layer_policy == {0: "k8v8", 1: "auto"}
    again = engines.create_config(llama, additional_config={"int8_kv": {"layer_policy": {0: "int8", "1": "auto"}}})
    assert again.cache_config.kv_cache_dtype_skip_layers == ["1"]


@pytest.mark.parametrize(
    ("additional_config", "message"),
    [
        (
            {"rotate_keys": False},
            "additional_config['rotate_keys'] has no effect: options of the INT8 KV cache belong into \"int8_kv\", as "
            "in additional_config={'int8_kv': {'rotate_keys': False}}",
        ),
        ({"int8kv": {}}, "additional_config['int8kv'] is unknown; did you mean additional_config[\"int8_kv\"]?"),
        ({"int8-kv": {}}, "did you mean"),
        ({"INT8_KV_CACHE": {}}, "did you mean"),
        ({"int8_custom": {}}, "did you mean"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_misplaced_options_are_refused(additional_config, message, registered, llama):
    with pytest.raises(ValueError) as caught:
        engines.create_config(llama, additional_config=additional_config)
    assert message in str(caught.value)
    engines.create_config(llama, additional_config={"of_another_plugin": 1, "int8": 2})


@pytest.mark.parametrize("name", ["-1", "3", "layer0", "0 ", "model.layers.0.self_attn.attn", "full_attention"])
def test_skipped_layers_that_do_not_exist_are_refused(name, registered, llama):
    expected = (
        f"kv_cache_dtype_skip_layers names '{name}', which is no layer of this model; use indices from '0' to '2', or "
        "'sliding_window'"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        engines.create_config(llama, kv_cache_dtype_skip_layers=["0", name])


@pytest.mark.engine
def test_a_sliding_window_that_no_layer_has_is_refused(llama):
    """Which layers have one is known when they have been built."""
    expected = (
        "kv_cache_dtype_skip_layers names 'sliding_window', but no layer of LlamaForCausalLM has a sliding window"
    )
    skip = {"kv_cache_dtype_skip_layers": ["sliding_window"]}
    with pytest.raises(ValueError, match=expected), engines.tiny_engine(llama, **skip):
        pass


@pytest.mark.engine
def test_an_engine_without_any_quantized_layer_is_refused(llama):
    expected = r"would be used by no layer of LlamaForCausalLM \(left unquantized by kv_cache_dtype_skip_layers or lay"
    skip = {"kv_cache_dtype_skip_layers": ["0", "1", "2"]}
    with pytest.raises(ValueError, match=expected), engines.tiny_engine(llama, **skip):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(attention_backend="CPU_ATTN"),
            "attention_backend='CPU_ATTN' cannot read kv_cache_dtype='int8_custom'; leave attention_backend out, or",
        ),
        (
            dict(attention_config={"backend_per_kind": {"full_attention": "CPU_ATTN"}}),
            "attention_config.backend_per_kind['full_attention']='CPU_ATTN' cannot read kv_cache_dtype='int8_custom'",
        ),
        (
            dict(attention_backend="INT8_KV", kv_cache_dtype="auto"),
            "attention_backend='INT8_KV' serves kv_cache_dtype='int8_custom', but kv_cache_dtype is 'auto'",
        ),
        (
            dict(speculative_config={"attention_backend": "INT8_KV", "kv_cache_dtype": "auto"}),
            "speculative_config: attention_backend='INT8_KV' does not fit kv_cache_dtype='auto'",
        ),
        (
            dict(speculative_config={"attention_backend": "CPU_ATTN"}),
            "speculative_config: attention_backend='CPU_ATTN' does not fit kv_cache_dtype='int8_custom'",
        ),
    ],
)
def test_a_backend_that_would_be_ignored_is_refused(options, message, registered, llama):
    with pytest.raises(ValueError) as caught:
        engines.create_config(llama, **with_draft(options, llama))
    assert message in str(caught.value)


def test_backends_that_fit_are_accepted(registered, llama):
    engines.create_config(llama, attention_backend="INT8_KV")
    engines.create_config(llama, attention_backend="CPU_ATTN", kv_cache_dtype="auto")
    engines.create_config(llama, attention_backend="CPU_ATTN", kv_cache_dtype_skip_layers=["0"])  # meant for that layer
    draft = {"attention_backend": "CPU_ATTN", "kv_cache_dtype": "auto"}
    engines.create_config(llama, **with_draft({"speculative_config": draft}, llama))


def with_draft(options: dict, model: Path) -> dict:
    """Options with the model and the length of a draft, if they have one."""
    if "speculative_config" not in options:
        return options
    return options | {
        "speculative_config": {"model": str(model), "num_speculative_tokens": 2} | options["speculative_config"]
    }


@pytest.mark.parametrize(
    "options",
    [
        dict(kv_cache_dtype_skip_layers=["1"]),
        dict(additional_config={"int8_kv": {"layer_policy": {1: "auto"}}}),
        dict(speculative_config={"kv_cache_dtype": "auto"}),
        dict(kv_cache_dtype="auto", speculative_config={"kv_cache_dtype": "int8_custom"}),
    ],
    ids=["skipped", "policy", "draft", "target"],
)
def test_a_block_size_must_suit_the_unquantized_layers_too(options, registered, llama):
    expected = (
        "block_size=16 does not suit the layers with kv_cache_dtype='auto', whose backend CPU_ATTN needs a multiple of "
        "32; use one of those, or leave block_size out"
    )
    options = with_draft(options, llama)
    with pytest.raises(ValueError, match=re.escape(expected)):
        engines.create_config(llama, block_size=16, **options)
    for block_size in (32, 96, None):
        engines.create_config(llama, block_size=block_size, **options)
    engines.create_config(llama, block_size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(additional_config={"int8_kv": {"rotate": 1}}), "has no option 'rotate'"),
        (dict(additional_config={"rotate_keys": False}), "additional_config['rotate_keys'] has no effect"),
        (
            dict(additional_config={"int8_kv": {"layer_policy": {0: "auto"}}}),
            'additional_config["int8_kv"]["layer_policy"] is about the layers of the target, whose kv_cache_dtype is '
            "'auto'; leave it out, or use kv_cache_dtype='int8_custom'",
        ),
        (
            dict(kv_transfer_config=dict(kv_connector="DecodeBenchConnector", kv_role="kv_both")),
            "the bytes of a slot lie in several planes",
        ),
    ],
    ids=["option", "place", "policy", "connector"],
)
def test_a_quantized_draft_is_checked_like_a_target(options, message, registered, llama):
    draft = with_draft({"speculative_config": {"kv_cache_dtype": "int8_custom"}}, llama)
    engines.create_config(llama, kv_cache_dtype="auto", **draft)
    with pytest.raises(ValueError) as caught:
        engines.create_config(llama, kv_cache_dtype="auto", **draft, **options)
    assert message in str(caught.value)


def test_a_draft_with_an_unsupported_head_size_is_refused(registered, llama, tmp_path):
    draft = {"model": str(tiny_models.unsupported_head_size(tmp_path)), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="head_size 40 not supported"):
        engines.create_config(
            llama, kv_cache_dtype="auto", speculative_config=draft | {"kv_cache_dtype": "int8_custom"}
        )


def test_options_are_not_looked_at_for_other_dtypes(registered, llama):
    engines.create_config(llama, kv_cache_dtype="auto", additional_config={"int8_kv": {"rotate": True}})


def test_options_from_any_additional_config():
    attributes = SimpleNamespace(int8_kv={"rotate_keys": False})
    assert Int8KVConfig.from_additional_config({}) == Int8KVConfig()
    assert Int8KVConfig.from_additional_config({"other": 1}) == Int8KVConfig()
    assert Int8KVConfig.from_additional_config({"int8_kv": {"rotate_keys": False}}).rotate_keys is False
    assert Int8KVConfig.from_additional_config(attributes).rotate_keys is False


def selector_request(**changes):
    """The fields of an `AttentionSelectorConfig` of a layer that is served."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    request = dict(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="int8_custom", block_size=None)
    return AttentionSelectorConfig(**request | changes)


@pytest.mark.parametrize(
    ("changes", "reason", "way_out"),
    [
        (dict(use_mla=True), "MLA not supported", OTHER_CACHE),
        (dict(use_sparse=True), "sparse not supported", OTHER_CACHE),
        (dict(attn_type="encoder_only"), "attention type encoder_only not supported", OTHER_CACHE),
        (dict(attn_type="encoder_decoder"), "attention type encoder_decoder not supported", OTHER_CACHE),
        (dict(head_size=576), "head_size 576 not supported", "with kv_cache_dtype_skip_layers"),
        (dict(dtype=torch.float64), "dtype torch.float64 not supported", "'float16' or 'float32'"),
        (dict(block_size=8), "block_size 8 not supported", "use a multiple of 16"),
        (dict(use_mm_prefix=True), "partial multimodal token full attention not supported", OTHER_CACHE),
        (dict(use_rswa=True), "R-SWA not supported", OTHER_CACHE),
        (dict(use_dcp=True), "DCP not supported", "use decode_context_parallel_size=1"),
        (dict(use_pcp=True), "PCP not supported", "use prefill_context_parallel_size=1"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_unsupported_layer_is_refused(changes, reason, way_out, registered):
    from vllm.platforms import current_platform

    with pytest.raises(ValueError, match=reason) as caught:
        current_platform.get_attn_backend_cls(None, selector_request(**changes))
    assert str(caught.value).endswith(way_out)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(has_sink=True),
        dict(has_sliding_window=True),
        dict(use_non_causal=True),
        dict(use_per_head_quant_scales=True),  # of a checkpoint, which this cache does not need
    ],
)
def test_supported_layer_gets_our_backend_and_others_keep_vllms(changes, registered):
    from vllm.platforms import current_platform

    ours, native = (
        current_platform.get_attn_backend_cls(None, selector_request(**changes | {"kv_cache_dtype": dtype}))
        for dtype in ("int8_custom", "auto")
    )
    assert ours == "vllm_int8kv.serving.backend.Int8KVBackend"
    assert native.startswith("vllm.")


def test_unequal_k_and_v_head_sizes_are_refused():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=192, head_size_v=128, dtype=torch.int8)
    with pytest.raises(ValueError, match="equal K and V head sizes, got head_size 192 and head_size_v 128"):
        backend.Int8KVBackend.customize_spec(spec)


# vLLM 0.33, whose engine needs a GPU but whose registration does not: `pytest -m vllm033`.


@pytest.mark.vllm033
def test_official_registration_of_033():
    """Downloads 340 MB once and unpacks it; nothing is installed."""
    folder = ROOT / "build" / VLLM_033.replace("==", "-")
    if not (folder / "vllm" / "_version.py").exists():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
        subprocess.run([*pip, VLLM_033], check=True)
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    code = (
        "import vllm; print(vllm.__version__)"
        + REGISTER_TWICE
        + """
from vllm.config.cache import KV_CACHE_DTYPES
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.kv_cache_interface import get_kv_quant_mode
print(KV_CACHE_DTYPES.count("int8_custom"))
print(STR_DTYPE_TO_TORCH_DTYPE["int8_custom"], get_kv_quant_mode("int8_custom").name)
"""
    )
    expected = ["0.33.0", *REGISTERED, "1", "torch.int8 NONE"]
    assert run_python(code, PYTHONPATH=path).splitlines() == expected
