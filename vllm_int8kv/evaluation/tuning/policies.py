"""What a policy costs: bits, bytes and tokens in the same memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_int8kv.evaluation.sensitivity import CacheShape
from vllm_int8kv.evaluation.tuning.schemes import EXACT, Scheme
from vllm_int8kv.evaluation.tuning.search import Policy

UNITS = ("bits", "bytes")


@dataclass(frozen=True)
class ModelShape:
    """The caches of all layers that have one."""

    layers: Mapping[int, CacheShape]

    @property
    def num_elements(self) -> int:
        """Elements of K and V per token."""
        return sum(map(_elements, self.layers.values()))

    @property
    def native_bytes(self) -> int:
        """Bytes per token without quantization."""
        return sum(shape.native_bytes for shape in self.layers.values())

    def layer_cost(self, layer: int, name: str, unit: str) -> float:
        """Of one layer per token: bits without scales, or bytes with them."""
        shape = self.layers[layer]
        if unit == "bytes":
            if name == EXACT:
                return shape.native_bytes
            return shape.num_kv_heads * Scheme.parse(name).bytes_per_token(shape.head_size)
        scheme = Scheme.parse(name)
        bits = 16 * shape.itemsize if name == EXACT else scheme.k_bits + scheme.v_bits
        return bits / 2 * _elements(shape)

    def mean_bits(self, policy: Mapping[int, str]) -> float:
        """Bits per element, scales not counted, as KVTuner counts them."""
        return sum(self.layer_cost(layer, name, "bits") for layer, name in policy.items()) / self.num_elements

    def bits_with_scales(self, policy: Mapping[int, str]) -> float:
        """Bits per element that the cache takes, scales and padding included."""
        return 8 * self._bytes(policy) / self.num_elements

    def tokens_ratio(self, policy: Mapping[int, str]) -> float:
        """Tokens in the same memory against the unquantized cache."""
        return self.native_bytes / self._bytes(policy)

    def uniform(self, name: str) -> Policy:
        """The policy that gives every layer the same."""
        return dict.fromkeys(self.layers, name)

    def _bytes(self, policy: Mapping[int, str]) -> float:
        return sum(self.layer_cost(layer, name, "bytes") for layer, name in policy.items())


def _elements(shape: CacheShape) -> int:
    return 2 * shape.num_kv_heads * shape.head_size


@dataclass(frozen=True)
class Limit:
    """What the policy must keep to."""

    option: str
    """of the command line: --max-bits, --max-kl or --min-tokens-ratio"""
    value: float

    @property
    def unit(self) -> str:
        """What the search saves."""
        return "bits" if self.option == "--max-bits" else "bytes"

    def budget(self, shape: ModelShape) -> float:
        """What all layers together may cost per token, in `unit`; not of --max-kl."""
        if self.option == "--max-bits":
            return self.value * shape.num_elements
        return shape.native_bytes / self.value

    def check(self, shape: ModelShape, pairs: Sequence[str]) -> None:
        """Raise ValueError if no policy of these pairs can keep to a limit of memory."""
        if self.option == "--max-kl":
            return
        uniform = [shape.uniform(pair) for pair in pairs]
        if self.option == "--max-bits" and (least := min(map(shape.mean_bits, uniform))) > self.value:
            raise ValueError(f"--max-bits {self.value:g} cannot be met: --pairs begin at {least:g} bits")
        if self.option == "--min-tokens-ratio" and (most := max(map(shape.tokens_ratio, uniform))) < self.value:
            raise ValueError(f"--min-tokens-ratio {self.value:g} cannot be met: --pairs reach {most:.2f}")


def complete(policy: Mapping[int, str], layers: Iterable[int], default: str) -> Policy:
    """A policy with `default` for the layers that it does not name, and without those that have no cache."""
    return {layer: policy.get(layer, default) for layer in layers}
