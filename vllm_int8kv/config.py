"""The options of the plugin: `LLM(..., additional_config={"int8_kv": {...}})`. Imports neither vLLM nor the kernels."""

import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import yaml

KV_CACHE_DTYPE = "int8_custom"
"""The value of vLLM's `kv_cache_dtype` that selects this cache."""

KEY = "int8_kv"
"""Where the options live in vLLM's `additional_config`."""

DEFAULT_FORMAT = "k8v8"
"""The name of the cache format of layers of which nothing else is said."""

LAYER_FORMATS = {"int8": DEFAULT_FORMAT, "auto": "auto"}
"""What a layer policy may say of a layer beside the names of the cache formats: eight bits, or the model's own
dtype."""


@dataclass(frozen=True)
class Int8KVConfig:
    """Options of the INT8 KV cache; the same in every worker of an engine."""

    rotate_keys: bool = True
    """Spread outlier channels of K over its head before quantization; exact for the scores."""

    equalize_keys: bool = True
    """Balance the channels of K against those of Q before quantization, by factors found when the model is loaded;
    exact for the scores. See `cache/equalization.py`."""

    format: str = DEFAULT_FORMAT
    """The cache format of all layers: `k6v4` has six bits for K and four for V; bits are 8, 6, 5, 4 or 2."""

    layer_policy: str | dict | None = None
    """`{layer index: a format's name, int8 or auto}`, or the path of a YAML or JSON file with it; layers it does not
    name have `format`, and so have all layers of a draft model. A policy of KVTuner, `{layer index: {nbits_key: 8,
    nbits_value: 4}}`, is one too. `vllm-int8kv eval --sensitivity --policy FILE` writes one."""

    cpu_isa: str | None = None
    """CPU kernel path, one of `library.cpu_isas()`; None for the fastest this machine has."""

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

    @staticmethod
    def set_layer_policy(additional_config: object, policy: Mapping[int, str]) -> None:
        """Put the policy itself in the place of its path, so that no worker has to find the file."""
        if isinstance(additional_config, dict):
            additional_config[KEY] = {**additional_config[KEY], "layer_policy": dict(policy)}
        else:
            options = getattr(additional_config, KEY)
            setattr(additional_config, KEY, {**options, "layer_policy": dict(policy)})

    @classmethod
    def from_additional_config(cls, additional_config: object) -> Self:
        """Take the options out of `VllmConfig.additional_config`: a mapping, or an object with attributes."""
        if isinstance(additional_config, Mapping):
            options = additional_config.get(KEY)
        else:
            options = getattr(additional_config, KEY, None)
        return cls() if options is None else cls.from_mapping(options)


def check_placement(additional_config: object) -> None:
    """Refuse options of this plugin that stand where nothing reads them.

    vLLM hands `additional_config` to whoever looks, and nobody complains about a key that nobody knows.

    Raises:
        ValueError: a key is an option of this plugin outside of `KEY`, or resembles `KEY`.
    """
    names = {field.name for field in fields(Int8KVConfig)}
    for key in additional_config if isinstance(additional_config, Mapping) else ():
        if key in names:
            raise ValueError(
                f'additional_config[{key!r}] has no effect: options of the INT8 KV cache belong into "{KEY}", as in '
                f"additional_config={{'{KEY}': {{'{key}': {additional_config[key]!r}}}}}"
            )
        if key != KEY and re.fullmatch(r"int8kv(cache)?|int8custom", re.sub(r"\W|_", "", str(key).lower())):
            raise ValueError(f'additional_config[{key!r}] is unknown; did you mean additional_config["{KEY}"]?')


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which no key may be given twice; PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for index, key in enumerate(keys) if key in keys[:index]]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_layer_policy(
    given: str | Path | Mapping[Any, Any], num_layers: int | None = None, formats: Collection[str] = ()
) -> dict[int, str]:
    """Check the value of the option `layer_policy`, and read its file if it is a path.

    Args:
        num_layers: of the model; None where it is not known yet, and any layer is accepted.
        formats: names of cache formats that layers may have, beside `LAYER_FORMATS`.

    Returns:
        By layer index the name of a format, or `auto`.

    Raises:
        ValueError: it cannot be read, names a layer twice, or names a layer or a format that does not exist.
    """
    what, policy = f'additional_config["{KEY}"]["layer_policy"]', given
    allowed = " or ".join(LAYER_FORMATS) + (f", or a format: {', '.join(formats)}" if formats else "")
    if isinstance(given, str | Path):
        what = f"{what}: {given}"
        try:
            policy = _UniqueKeyLoader(Path(given).expanduser().read_text()).get_single_data()  # JSON is YAML
        except (OSError, RuntimeError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{what} cannot be read: {error}") from None
    if not isinstance(policy, Mapping):
        raise ValueError(f"{what} must hold a mapping of layers to {allowed}, got {policy!r}")
    found: dict[int, str] = {}
    for layer, layer_format in policy.items():
        index = int(layer) if isinstance(layer, str) and re.fullmatch("[0-9]+", layer) else layer
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"{what} names layer {layer!r}; layers are numbers from 0 on")
        if num_layers is not None and index >= num_layers:
            raise ValueError(f"{what} names layer {layer!r}; the model has layers 0 to {num_layers - 1}")
        if index in found:
            raise ValueError(f"{what} names layer {index} twice")
        name = _kvtuner_format(layer_format) if isinstance(layer_format, Mapping) else layer_format
        if name not in (*LAYER_FORMATS, *formats):
            raise ValueError(f"{what} gives layer {index} the format {layer_format!r}; use {allowed}")
        found[index] = LAYER_FORMATS.get(name, name)
    return found


def _kvtuner_format(pair: Mapping[Any, Any]) -> str | None:
    """The name of a pair of precisions as KVTuner writes it, if it is one."""
    return f"k{pair['nbits_key']}v{pair['nbits_value']}" if pair.keys() == {"nbits_key", "nbits_value"} else None


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
