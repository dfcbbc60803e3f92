"""The attention layers of a model that is being built: which cache format each has, and which model it belongs to.

vLLM tells an attention implementation neither its name nor its parents nor when the model is complete, and asks every
layer for its backend class when it counts the bytes of a page. PyTorch reports every registration of a submodule, from
the leaves to the root, right after a layer was constructed: there a layer gets the backend class of its format, and the
parents are noted.
"""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.model_executor.models.utils import extract_layer_index

from vllm_int8kv.cache.formats import FORMATS, K8V8, CacheFormat
from vllm_int8kv.config import Int8KVConfig, read_layer_policy

DEFAULT_FORMAT = K8V8
"""Of layers that no policy names, and what the word int8 means in a policy."""


def formats_of_policy(vllm_config: Any) -> dict[int, CacheFormat]:
    """By layer index: the formats that the option `layer_policy` asks for; not those of layers it leaves to vLLM.

    Raises:
        ValueError: the policy cannot be read or names something that does not exist.
    """
    options = Int8KVConfig.from_additional_config(vllm_config.additional_config)
    if options.layer_policy is None:
        return {}
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    policy = read_layer_policy(options.layer_policy, num_layers, FORMATS)
    return {index: FORMATS.get(name, DEFAULT_FORMAT) for index, name in policy.items() if name != "auto"}


def is_ours(module: nn.Module) -> bool:
    """Whether a module is an attention layer with this cache."""
    return isinstance(getattr(getattr(module, "impl", None), "cache_format", None), CacheFormat)


class LayerRegistry:
    """What is known of the attention layers of this process; one instance, see `registry`."""

    def __init__(self) -> None:
        self._parents: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
        self._ancestors: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hook: Any = None

    def watch(self) -> None:
        """Watch registrations in this process from here on."""
        if self._hook is None:
            self._hook = nn.modules.module.register_module_module_registration_hook(self._on_registration)

    def _on_registration(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        if is_ours(child):
            assign_format(child, formats_of_policy(child.impl.vllm_config))
        elif child not in self._ancestors:
            return
        self._parents[child] = weakref.ref(parent)
        self._ancestors.add(parent)

    def root(self, module: nn.Module) -> nn.Module:
        """The outermost module that contains this one."""
        while (reference := self._parents.get(module)) is not None and (parent := reference()) is not None:
            module = parent
        return module


registry = LayerRegistry()


def assign_format(layer: Any, formats: Mapping[int, CacheFormat]) -> None:
    """Give a layer the backend class of its format; one that reads the cache of another layer has that one's.

    Args:
        layer: vLLM's `Attention` with an `Int8KVImpl`.
        formats: by layer index; layers that are not there have `DEFAULT_FORMAT`.
    """
    owner = layer.kv_sharing_target_layer_name or layer.layer_name
    layer.impl.cache_format = formats.get(extract_layer_index(owner), DEFAULT_FORMAT) if formats else DEFAULT_FORMAT
    layer.attn_backend = layer.attn_backend.of_format(layer.impl.cache_format)
