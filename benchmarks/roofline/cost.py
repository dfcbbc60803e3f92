"""What decoding from X in place costs: arithmetic and bytes of one layer in one step (section 3.4 of arXiv 2508.10395).

A step reads the layer's weights once, and of every token of every sequence the cache. From X it also multiplies: K and
V of all tokens in every step, 4 d d_kv operations per token. While compute and memory overlap, this is free as long as
it takes no longer than the reading:

    batch l F / peak <= (W + batch l B) / bandwidth    so    l <= P W / (batch (F - P B)),  P = peak / bandwidth

with F operations and B bytes per token and W bytes of weights. The paper has this for one sequence; weights are
read once for a batch and tokens for each of its sequences, so the length shrinks with the batch. Work on the new token
is left out, as there.
"""

import math
from dataclasses import dataclass

BF16_BYTES = 2
X_BITS = (2, 8)
"""Of the codes; 2 is the paper's example."""


@dataclass(frozen=True)
class Machine:
    """Peaks of one device."""

    name: str
    flops_per_s: float
    """dense bf16 matrix products"""
    bytes_per_s: float
    source: str

    @property
    def ridge(self) -> float:
        """P, operations per byte at which compute takes as long as memory."""
        return self.flops_per_s / self.bytes_per_s


H100_SHEET = "NVIDIA H100 datasheet (2023), without sparsity"
MACHINES = (
    Machine("H100 PCIe", 756e12, 2.0e12, f"{H100_SHEET}; the paper's"),
    Machine("H100 SXM", 989e12, 3.35e12, H100_SHEET),
    Machine("H200 SXM", 989e12, 4.8e12, "NVIDIA H200 datasheet (2024), without sparsity"),
)
"""Published peaks; sheets state twice the operations, for sparse matrices."""


@dataclass(frozen=True)
class Model:
    """The shapes of a layer, with a gated MLP."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int

    @property
    def kv_width(self) -> int:
        """Elements of K, or of V, per token."""
        return self.num_kv_heads * self.head_size

    @property
    def weight_bytes(self) -> int:
        """W, of a layer in bf16."""
        attention = 2 * self.hidden_size * (self.num_heads * self.head_size + self.kv_width)
        return BF16_BYTES * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def k8v8_bytes(self) -> int:
        """Of a token in this project's INT8 cache: codes and a bf16 scale per head of K and of V."""
        return 2 * self.num_kv_heads * (self.head_size + BF16_BYTES)


MODELS = (
    Model("Llama-2-7B", 4096, 32, 32, 128, 11008),
    Model("Llama-3.1-8B", 4096, 32, 8, 128, 14336),
    Model("SmolLM2-135M", 576, 9, 3, 64, 1536),
)


@dataclass(frozen=True)
class Cost:
    """Of a token in the cache, per step."""

    name: str
    flops: float
    """F"""
    bytes: float
    """B"""


def from_x(model: Model, bits: int) -> Cost:
    """X itself: K and V by the model's own projections. Scales are not counted, as in the paper."""
    return Cost(f"X, {bits} bits", 4 * model.hidden_size * model.kv_width, bits / 8 * model.hidden_size)


def from_latents(model: Model, bits: int) -> Cost:
    """The latents of XQuant's variant for grouped queries, as wide as K and V."""
    return Cost(f"latents, {bits} bits", 4 * model.kv_width**2, 2 * bits / 8 * model.kv_width)


def k8v8(model: Model) -> Cost:
    """Reading INT8 K and V; attention itself, the same for all, counts nowhere."""
    return Cost("K8V8", 0, model.k8v8_bytes)


def free_length(machine: Machine, model: Model, cost: Cost, batch: int = 1) -> float:
    """The context length up to which rematerialization hides behind reading; infinite where it always does."""
    excess = cost.flops - machine.ridge * cost.bytes
    return machine.ridge * model.weight_bytes / (batch * excess) if excess > 0 else math.inf


def layer_seconds(machine: Machine, model: Model, cost: Cost, length: int, batch: int = 1) -> float:
    """A layer's step: the longer one of its arithmetic and its reading."""
    memory = (model.weight_bytes + batch * length * cost.bytes) / machine.bytes_per_s
    return max(batch * length * cost.flops / machine.flops_per_s, memory)


def slowdown(machine: Machine, model: Model, cost: Cost, length: int, batch: int = 1) -> float:
    """Time of a layer's step against the same from INT8 K and V; below 1 it is faster."""
    return layer_seconds(machine, model, cost, length, batch) / layer_seconds(
        machine, model, k8v8(model), length, batch
    )


def attention_slowdown(machine: Machine, model: Model, cost: Cost) -> float:
    """The same for attention alone: rematerialization against reading INT8 K and V, without the weights; any length."""
    return max(cost.flops / machine.flops_per_s, cost.bytes / machine.bytes_per_s) / (
        model.k8v8_bytes / machine.bytes_per_s
    )
