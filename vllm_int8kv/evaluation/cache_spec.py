"""A KV cache as users spell it: `auto`, `fp8`, `int8_custom`, `int8_custom:format=k6v4`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from vllm_int8kv.config import KEY, KV_CACHE_DTYPE, Int8KVConfig, read_layer_policy
from vllm_int8kv.evaluation.engine_options import OWN, check_cache_dtype, check_engine_options


@dataclass(frozen=True)
class CacheSpec:
    """A KV cache dtype and its options."""

    name: str
    """As it was spelled."""
    kv_cache_dtype: str
    int8_kv: dict[str, Any] = field(default_factory=dict)
    """Options of this plugin, for its own dtype."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `LLM`, for other dtypes."""

    @classmethod
    def parse(cls, text: str, option: str, *, reserved: Mapping[str, str] = OWN, folder: Path | None = None) -> Self:
        """Read `DTYPE` or `DTYPE:OPTION=VALUE:...`.

        `int8_custom:format=k6v4` sets an option of this plugin, `fp8:block_size=64` an argument of vLLM's `LLM`. The
        file of a layer policy is read here and now, so that no engine has to find it.

        Args:
            option: where the text was given, as errors call it.
            reserved: arguments of `LLM` that are set in another way, and in which.
            folder: where the path of a layer policy begins; by default the working directory.

        Raises:
            ValueError: vLLM has no such dtype; an option has no value, is unknown or has the wrong type; or the file
                of a layer policy cannot be followed.
            ImportError: vLLM is not installed.
        """
        kv_cache_dtype, *options = text.split(":")
        check_cache_dtype(kv_cache_dtype, option)
        where, chosen = f"{option} {text}", {}
        for chosen_option in options:
            name, separator, value = chosen_option.partition("=")
            if not separator:
                raise ValueError(f"{where}: expected OPTION=VALUE after {kv_cache_dtype}:, got {chosen_option!r}")
            try:
                chosen[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError(f"{where}: the value of {name} must be YAML, got {value!r}") from None
        if kv_cache_dtype != KV_CACHE_DTYPE:
            check_engine_options(chosen, where, reserved)
            return cls(text, kv_cache_dtype, engine_options=chosen)
        try:
            return cls(text, kv_cache_dtype, int8_kv=_check_options(chosen, folder or Path()))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def llm_arguments(self, additional_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The keyword arguments of `LLM` for this cache.

        Args:
            additional_config: what else the engine is given as this argument; it stays beside the cache's options.

        Raises:
            ValueError: it is no mapping, or an option of this plugin in it is unknown, has the wrong type, or another
                value than here.
        """
        arguments = {"kv_cache_dtype": self.kv_cache_dtype, **self.engine_options}
        if not (additional_config or self.int8_kv):
            return arguments
        if not isinstance(additional_config or {}, Mapping):
            raise ValueError(f"additional_config must be a mapping, got {additional_config!r}")
        others = dict(additional_config or {})
        Int8KVConfig.from_additional_config(others)
        given = others.get(KEY) or {}
        for name, value in self.int8_kv.items():
            if given.get(name, value) != value:
                raise ValueError(
                    f'{self.name} sets {name}, and additional_config["{KEY}"] sets it to {given[name]!r}: leave out '
                    "one of the two"
                )
        if self.int8_kv:
            others[KEY] = {**given, **self.int8_kv}
        return arguments | {"additional_config": others}


def _check_options(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options of this plugin with the layer policy itself in the place of its path.

    Raises:
        ValueError: an option is wrong.
    """
    if not options:
        return {}
    # Importing PyTorch takes seconds, which a process that only waits for its engines does without.
    from vllm_int8kv.cache.formats import FORMATS, check_format

    config, checked = Int8KVConfig.from_mapping(options), dict(options)
    check_format(config.format, "format")
    if (policy := config.layer_policy) is not None:
        if isinstance(policy, str) and not policy.startswith("~"):
            policy = folder / policy
        checked["layer_policy"] = read_layer_policy(policy, None, FORMATS)
    if config.cpu_isa is not None:
        _check_cpu_isa(config.cpu_isa)
    return checked


def _check_cpu_isa(isa: str) -> None:
    from vllm_int8kv.cache import library

    if isa not in library.cpu_isas():
        raise ValueError(f"cpu_isa must be one of {', '.join(library.cpu_isas())} on this CPU, got {isa!r}")
