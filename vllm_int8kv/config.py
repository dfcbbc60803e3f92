"""The options of the plugin: `LLM(..., additional_config={"int8_kv": {...}})`. Imports neither vLLM nor the kernels."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

KV_CACHE_DTYPE = "int8_custom"
"""The value of vLLM's `kv_cache_dtype` that selects this cache."""

KEY = "int8_kv"
"""Where the options live in vLLM's `additional_config`."""


@dataclass(frozen=True)
class Int8KVConfig:
    """Options of the INT8 KV cache; the same in every worker of an engine."""

    rotate_keys: bool = True
    """Spread outlier channels of K over its head before quantization; exact for the scores."""

    equalize_keys: bool = True
    """Balance the channels of K against those of Q before quantization, by factors found when the model is loaded;
    exact for the scores. See `equalization.py`."""

    cpu_isa: str | None = None
    """CPU kernel path, one of `ops.cpu_isas()`; None for the fastest this machine has."""

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Check and take the options as the user wrote them.

        Raises:
            ValueError: an option is unknown or has the wrong type; names it, what was expected and what came.
        """
        if not isinstance(options, Mapping):
            raise ValueError(f'additional_config["{KEY}"] must be a mapping of options, got {options!r}')
        types = {field.name: field.type for field in fields(cls)}
        for name, value in options.items():
            if name not in types:
                raise ValueError(
                    f'additional_config["{KEY}"] has no option {name!r}; expected one of: {", ".join(sorted(types))}'
                )
            if not isinstance(value, types[name]):
                raise ValueError(
                    f'additional_config["{KEY}"]["{name}"] must be {_type_name(types[name])}, '
                    f"got {value!r} ({type(value).__name__})"
                )
        return cls(**options)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> Self:
        """Take the options out of `VllmConfig.additional_config`: a mapping, or an object with attributes."""
        if isinstance(additional_config, Mapping):
            options = additional_config.get(KEY)
        else:
            options = getattr(additional_config, KEY, None)
        return cls() if options is None else cls.from_mapping(options)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
