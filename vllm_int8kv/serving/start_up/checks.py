"""What is refused before an engine starts, in the process of the user: each time what was asked, why not, what to do.

Options of this plugin, features of vLLM that would not work with this cache, and models that it does not serve. What
depends on a single layer is refused again where vLLM asks its platform for that layer's backend.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from vllm_int8kv.config import DEFAULT_FORMAT, KEY, KV_CACHE_DTYPE, Int8KVConfig, check_placement
from vllm_int8kv.serving.start_up.connectors import connector_reasons, separate_folders

BACKEND_NAME = "INT8_KV"


def check_engine(vllm_config: Any, choose_native_backend: Any) -> None:
    """Check the configuration of an engine whose target or draft has this cache, and apply the layer policy.

    Args:
        vllm_config: a `VllmConfig`; the policy's unquantized layers are added to its skipped layers, and folders of
            connectors get a subfolder.
        choose_native_backend: the platform's own `get_attn_backend_cls`.

    Raises:
        ValueError: an option is wrong, or the model or a feature is not supported; says what to do.
    """
    from vllm.platforms import current_platform

    from vllm_int8kv.cache.formats import FORMATS
    from vllm_int8kv.config import read_layer_policy
    from vllm_int8kv.serving.layers import UNQUANTIZED, is_draft, policy_of

    options = _check_options(vllm_config.additional_config)
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    if model_config is None or is_draft(model_config):  # the target's configuration has been checked
        return
    policy: dict[int, str] = {}
    if cache_config.cache_dtype == KV_CACHE_DTYPE:
        _check_skip_layers(cache_config, model_config.get_total_num_hidden_layers())
        policy = policy_of(vllm_config, model_config)
        skipped = {str(layer) for layer, layer_format in policy.items() if layer_format == UNQUANTIZED}
        cache_config.kv_cache_dtype_skip_layers = sorted({*cache_config.kv_cache_dtype_skip_layers, *skipped})
        if options.layer_policy is not None:
            Int8KVConfig.set_layer_policy(vllm_config.additional_config, policy)
    elif options.layer_policy is not None:
        read_layer_policy(options.layer_policy, None, FORMATS)
        raise ValueError(
            f'additional_config["{KEY}"]["layer_policy"] is about the layers of the target, whose kv_cache_dtype is '
            f"{cache_config.cache_dtype!r}; leave it out, or use kv_cache_dtype={KV_CACHE_DTYPE!r}"
        )
    _check_backends(vllm_config)
    _check_block_size(vllm_config, choose_native_backend)
    reasons = [*connector_reasons(vllm_config)]
    if not current_platform.is_cpu():
        for checked in _checked_models(vllm_config):
            formats = {options.format} if is_draft(checked) else {options.format, *policy.values()} - {UNQUANTIZED}
            reasons += _formats_without_cuda_kernels(formats, checked.get_head_size())
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    if current_platform.is_cpu() and num_stages > 1:
        reasons.append(
            f"pipeline_parallel_size={num_stages}: on CPU the scheduler of vLLM 0.32 loses requests between the stages "
            "(KeyError in update_from_output), with every KV cache dtype; use tensor_parallel_size"
        )
    if reasons:
        raise ValueError(f"kv_cache_dtype={KV_CACHE_DTYPE!r} does not support {'; nor '.join(reasons)}")
    separate_folders(vllm_config, policy)
    for checked in _checked_models(vllm_config):
        refuse_unsupported(_selector_request(vllm_config, checked))


def check_other_engine(vllm_config: Any) -> None:
    """Refuse to ignore what asks for this cache in an engine without it.

    Raises:
        ValueError: the backend of this plugin was selected, but not its KV cache dtype.
    """
    for name, backend in _selected_backends(vllm_config):
        if backend == BACKEND_NAME:
            raise ValueError(
                f"{name}={BACKEND_NAME!r} serves kv_cache_dtype={KV_CACHE_DTYPE!r}, but kv_cache_dtype is "
                f"{vllm_config.cache_config.cache_dtype!r}; set kv_cache_dtype, it selects the backend by itself"
            )


def _check_options(additional_config: object) -> Int8KVConfig:
    from vllm_int8kv.cache import library
    from vllm_int8kv.cache.formats import check_format

    check_placement(additional_config)
    options = Int8KVConfig.from_additional_config(additional_config)
    check_format(options.format, f'additional_config["{KEY}"]["format"]')
    if options.cpu_isa is not None and options.cpu_isa not in library.cpu_isas():
        raise ValueError(
            f'additional_config["{KEY}"]["cpu_isa"] must be one of {", ".join(library.cpu_isas())} on this machine, '
            f"got {options.cpu_isa!r}"
        )
    return options


def _formats_without_cuda_kernels(formats: Iterable[str], head_size: int) -> Iterator[str]:
    """A reason to refuse a model on a GPU, if there is one; `layers.assign_format` looks at each layer's head size."""
    from vllm_int8kv.cache.formats import FORMATS, MAX_CUDA_HEAD_SIZE

    missing = sorted(name for name in formats if not FORMATS[name].has_cuda_kernels(head_size))
    if missing:
        yield (
            f"the cache formats {', '.join(missing)} with head_size {head_size} on a GPU, where they have kernels for "
            f"head sizes up to {MAX_CUDA_HEAD_SIZE}; use {DEFAULT_FORMAT}"
        )


def _check_skip_layers(cache_config: Any, num_layers: int) -> None:
    """vLLM compares these names with layer indices and one kind of layer, and says nothing of others."""
    from vllm_int8kv.serving.layers import SLIDING_WINDOW

    known = {*map(str, range(num_layers)), SLIDING_WINDOW}
    if unknown := [name for name in cache_config.kv_cache_dtype_skip_layers if name not in known]:
        raise ValueError(
            f"kv_cache_dtype_skip_layers names {unknown[0]!r}, which is no layer of this model; use indices from '0' "
            f"to '{num_layers - 1}', or '{SLIDING_WINDOW}'"
        )


def _selected_backends(vllm_config: Any) -> Iterator[tuple[str, str]]:
    """Option and name of every attention backend that was asked for."""
    attention_config = vllm_config.attention_config
    if attention_config.backend is not None:
        yield "attention_backend", attention_config.backend.name
    for kind, backend in (attention_config.backend_per_kind or {}).items():
        if backend is not None:
            yield f"attention_config.backend_per_kind[{kind!r}]", backend.name


def _check_backends(vllm_config: Any) -> None:
    """The KV cache dtype decides the backend; another one can only be meant for layers without it."""
    cache_config, speculative_config = vllm_config.cache_config, vllm_config.speculative_config
    if cache_config.cache_dtype == KV_CACHE_DTYPE:
        # vLLM selects Triton for Gemma-4 by itself, whose heads differ in size; platforms that ask us never get there.
        by_vllm = "TRITON_ATTN" if vllm_config.model_config.architecture.startswith("Gemma4") else None
        for name, backend in _selected_backends(vllm_config):
            if backend not in (BACKEND_NAME, by_vllm) and not cache_config.kv_cache_dtype_skip_layers:
                raise ValueError(
                    f"{name}={backend!r} cannot read kv_cache_dtype={KV_CACHE_DTYPE!r}; leave {name} out, or use "
                    "kv_cache_dtype='auto'"
                )
    else:
        check_other_engine(vllm_config)
    if speculative_config is None or speculative_config.attention_backend is None:
        return
    draft_dtype = speculative_config.kv_cache_dtype or cache_config.cache_dtype
    draft_backend = speculative_config.attention_backend.name
    if (draft_backend == BACKEND_NAME) != (draft_dtype == KV_CACHE_DTYPE):
        raise ValueError(
            f"speculative_config: attention_backend={draft_backend!r} does not fit kv_cache_dtype={draft_dtype!r}; "
            "leave attention_backend out"
        )


def _check_block_size(vllm_config: Any, choose_native_backend: Any) -> None:
    """Blocks are shared by all layers, also those with another cache, so a size that was asked for must suit both
    backends; one that vLLM chooses does."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import AttentionSelectorConfig

    cache_config, speculative_config = vllm_config.cache_config, vllm_config.speculative_config
    dtypes = {cache_config.cache_dtype, getattr(speculative_config, "kv_cache_dtype", None) or cache_config.cache_dtype}
    dtypes |= {"auto"} if cache_config.kv_cache_dtype_skip_layers else set()
    model_config = vllm_config.model_config
    if not cache_config.user_specified_block_size or model_config.use_mla:
        return
    for dtype in sorted(dtypes - {KV_CACHE_DTYPE}):
        request = AttentionSelectorConfig(
            head_size=model_config.get_head_size(),
            dtype=model_config.dtype,
            kv_cache_dtype=dtype,
            block_size=cache_config.block_size,
        )
        backend = vllm_config.attention_config.backend
        backend = None if backend is None or backend.name == BACKEND_NAME else backend
        native = resolve_obj_by_qualname(choose_native_backend(backend, request))
        if not native.supports_block_size(cache_config.block_size):
            sizes = ", ".join(_size_text(size) for size in native.get_supported_kernel_block_sizes())
            raise ValueError(
                f"block_size={cache_config.block_size} does not suit the layers with kv_cache_dtype={dtype!r}, whose "
                f"backend {native.get_name()} needs {sizes}; use one of those, or leave block_size out"
            )


def _size_text(size: Any) -> str:
    return str(size) if isinstance(size, int) else f"a multiple of {size.base}"


def _checked_models(vllm_config: Any) -> Iterator[Any]:
    """The models of an engine that have this cache."""
    if vllm_config.cache_config.cache_dtype == KV_CACHE_DTYPE:
        yield vllm_config.model_config
    speculative_config = vllm_config.speculative_config
    draft = getattr(speculative_config, "draft_model_config", None)
    if draft is not None and speculative_config.kv_cache_dtype == KV_CACHE_DTYPE:
        yield draft


def _selector_request(vllm_config: Any, model_config: Any) -> dict[str, Any]:
    """What vLLM will ask for the layers of a model, as far as its configuration says."""
    parallel_config = vllm_config.parallel_config
    return dict(
        head_size=model_config.get_head_size(),
        dtype=model_config.dtype,
        kv_cache_dtype=KV_CACHE_DTYPE,
        block_size=vllm_config.cache_config.block_size,
        use_mla=model_config.use_mla,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=model_config.is_mm_prefix_lm,
        use_per_head_quant_scales=False,
        attn_type=_attn_type(model_config),
        use_pcp=parallel_config.prefill_context_parallel_size > 1,
        use_dcp=parallel_config.decode_context_parallel_size > 1,
        use_rswa=model_config.rswa_window is not None,
    )


def _attn_type(model_config: Any) -> str:
    """The type of the model's attention layers that have a KV cache."""
    if model_config.is_encoder_decoder:
        return "encoder_decoder"
    # A hybrid has decoder layers beside layers with a state (Mamba, convolutions), which are not ours.
    return "decoder" if model_config.attn_type == "hybrid" else model_config.attn_type


def refuse_unsupported(request: dict[str, Any]) -> None:
    """Raise ValueError unless the backend serves `request`, the fields of vLLM's `AttentionSelectorConfig`."""
    from vllm.platforms import current_platform

    from vllm_int8kv.serving.backend import Int8KVBackend

    reasons = Int8KVBackend.validate_configuration(
        device_capability=current_platform.get_device_capability(), **request
    )
    if reasons:
        raise ValueError(
            f"kv_cache_dtype={KV_CACHE_DTYPE!r} cannot serve this model or configuration: "
            f"{'; '.join(_explain(reason, request) for reason in reasons)}"
        )


def _explain(reason: str, request: dict[str, Any]) -> str:
    """A reason of vLLM with what was asked, what is there, and a way out that works."""
    from vllm_int8kv.cache.formats import HEAD_SIZES_TEXT, SLOT_GROUP

    other_cache = "use kv_cache_dtype='auto'"
    explained = {
        "head_size not supported": f"head_size {request['head_size']} not supported (supported: {HEAD_SIZES_TEXT}); "
        f"{other_cache}, or leave single layers with this head size unquantized with kv_cache_dtype_skip_layers",
        "dtype not supported": f"dtype {request['dtype']} not supported; use dtype='bfloat16', 'float16' or 'float32'",
        "block_size not supported": f"block_size {request['block_size']} not supported; use a multiple of {SLOT_GROUP}",
        "MLA not supported": "MLA not supported, as its cache holds one latent vector for all heads, which this format "
        f"does not store; {other_cache}",
        "compute capability not supported": "the compute capability of this GPU is not supported (7.5 or newer is); "
        f"{other_cache}",
        "PCP not supported": "PCP not supported; use prefill_context_parallel_size=1",
        "DCP not supported": "DCP not supported; use decode_context_parallel_size=1",
        "batch invariance not supported": "batch invariance not supported on GPUs; unset VLLM_BATCH_INVARIANT",
    }
    return explained.get(reason, f"{reason}; {other_cache}")
