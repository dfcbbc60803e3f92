"""Where this plugin follows vLLM: a layer is built, a model is loaded, an engine has been asked to change its weights.

vLLM has no hook for any of them. Each wrapper says why it is needed and until when. They are put in place as late as
possible: importing what they wrap takes seconds that a front end or a model inspection need not spend.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.serving.start_up.connectors import is_store

WORKER_MODULE, CORE_MODULE = "vllm.v1.worker.worker_base", "vllm.v1.engine.core"

SYMBOLS = (
    "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device",
    "vllm.v1.engine.core:EngineCore.collective_rpc",
    "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache",
    "vllm.model_executor.model_loader:_LOAD_FORMAT_TO_MODEL_LOADER",
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
    "vllm.model_executor.layers.attention:Attention.__init__",
    "vllm.model_executor.layers.attention:ChunkedLocalAttention.__init__",
)
"""Upstream symbols that are wrapped or called, `module:attribute`."""


def follow_processes(*, import_them: bool = False) -> None:
    """Follow the workers and the engine core of this process, as far as vLLM has imported them.

    Both are imported before they load the plugin in processes of their own. Where they run in the process of the
    user, they may be imported later; `import_them` is for that.
    """
    for module, follow in ((WORKER_MODULE, _follow_worker), (CORE_MODULE, _follow_engine_core)):
        if import_them:
            __import__(module)
        if module in sys.modules:
            follow()


def uses_this_cache(vllm_config: Any) -> bool:
    """Whether the target or the draft model of an engine has the INT8 cache."""
    speculative_config = vllm_config.speculative_config
    dtypes = [vllm_config.cache_config.cache_dtype, getattr(speculative_config, "kv_cache_dtype", None)]
    return KV_CACHE_DTYPE in dtypes


def must_follow(vllm_config: Any) -> bool:
    """Whether something of an engine depends on its weights: key equalizers, or blocks in the store."""
    return uses_this_cache(vllm_config) or is_store(vllm_config)


def _wrap(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a method that a class defines itself, once."""
    method = vars(owner).get(name)
    if method is None or getattr(method, "is_int8kv_wrapper", False):
        return
    wrapper = functools.wraps(method)(make(method))
    wrapper.is_int8kv_wrapper = True
    setattr(owner, name, wrapper)


def _follow_worker() -> None:
    """Follow layers and loaders from the start of a worker on, when vLLM has imported both."""

    def make(init_device: Callable) -> Callable:
        def wrapper(self: Any) -> None:
            if uses_this_cache(self.vllm_config):
                follow_layers()
            if must_follow(self.vllm_config):
                follow_loaders()
            init_device(self)

        return wrapper

    _wrap(sys.modules[WORKER_MODULE].WorkerWrapperBase, "init_device", make)


def follow_layers() -> None:
    """Settle the cache of every attention layer that is built.

    Symptom: a layer that reads another one's cache is quantized or not by its own index, so that Gemma-3n with
    `kv_cache_dtype_skip_layers` reads INT8 as bf16 (NaN), or fails at the first request; the skipped layers of chunked
    local attention get the quantized backend; drafts are built by the target's list. And a layer must know its name
    before its format can be looked up. Remove when a backend is asked for its class layer by layer.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

    from vllm_int8kv.serving import layers

    def make(init: Callable) -> Callable:
        signature = inspect.signature(init)

        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            given = bound.arguments
            context = get_current_vllm_config().compilation_config.static_forward_context
            given["cache_config"] = layers.settle_cache_config(
                given.get("cache_config"),
                given.get("prefix", ""),
                context.get(given.get("kv_sharing_target_layer_name")),
                given.get("per_layer_sliding_window"),
            )
            init(*bound.args, **bound.kwargs)
            if layers.is_ours(self):
                layers.assign_format(self)

        return wrapper

    for layer_class in (Attention, ChunkedLocalAttention):
        _wrap(layer_class, "__init__", make)


def follow_loaders() -> None:
    """Check and calibrate every model that has been loaded.

    Symptom: attention layers are told when their own weights are there, never when the whole model is, nor which
    model they belong to (the Transformers backend registers them in a tree that is already built). Remove when
    platforms or backends get a hook behind `load_model`.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor import model_loader

    from vllm_int8kv.serving import calibration, layers

    def make(load_model: Callable) -> Callable:
        def wrapper(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
            if vllm_config.cache_config.cache_dtype == KV_CACHE_DTYPE:
                with layers.building(vllm_config, model_config):
                    model = load_model(self, vllm_config, model_config, *args, **kwargs)
                layers.check_layers(model, vllm_config, model_config)
            else:
                model = load_model(self, vllm_config, model_config, *args, **kwargs)
            if must_follow(vllm_config):
                calibration.follow(model, vllm_config, model_config)
            if is_store(vllm_config):
                KVConnectorFactory.get_connector_class(vllm_config.kv_transfer_config).follow_model(model, vllm_config)
            return model

        return wrapper

    for loader in model_loader._LOAD_FORMAT_TO_MODEL_LOADER.values():
        for base in loader.__mro__:
            _wrap(base, "load_model", make)


def _follow_engine_core() -> None:
    """Find key equalizers anew when something has changed the weights of a running engine.

    Symptom: `reload_weights`, `update_weights` and whatever else `collective_rpc` calls in the workers leave the
    factors of the old weights, which may be 128 times off, and blocks that were written with them. Remove when vLLM
    tells backends that weights have changed.
    """

    def make(collective_rpc: Callable) -> Callable:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
            try:
                results = collective_rpc(self, *args, **kwargs)
            finally:  # what failed may have written some weights
                leave_store(self)
            if must_follow(self.vllm_config):
                follow_weights(self)
            return results

        return wrapper

    _wrap(sys.modules[CORE_MODULE].EngineCore, "collective_rpc", make)


def leave_store(engine_core: Any) -> None:
    """End an engine's use of the KV store if some of its weights are new: its files are about the old ones."""
    from vllm_int8kv.serving import calibration

    if not is_store(engine_core.vllm_config) or getattr(engine_core, "scheduler", None) is None:
        return
    if any(engine_core.model_executor.collective_rpc(calibration.has_touched_weights)):
        engine_core.scheduler.connector.weights_changed()


def follow_weights(engine_core: Any) -> None:
    """Let the workers of an engine core find new factors if its weights are new.

    Blocks that were written with other factors cannot be read any more: running requests are preempted, to be computed
    again with the new weights, and the prefix cache is emptied.
    """
    from vllm_int8kv.serving import calibration

    # Before there is a scheduler, an engine asks its workers for sizes.
    if getattr(engine_core, "scheduler", None) is None:
        return
    in_workers = engine_core.model_executor.collective_rpc
    # All workers must find factors together, as the pass goes through their collectives.
    if not any(in_workers(calibration.has_new_weights)):
        return
    if any(in_workers(calibration.calibrate_again)):
        engine_core.scheduler.reset_prefix_cache(reset_running_requests=True)
