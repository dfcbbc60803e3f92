"""The layers of a model as codecs of inputs see them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputLayer:
    """What goes into the projection of K and V of one layer, `[num_tokens, hidden_size]`."""

    name: str
    hidden_size: int
    block_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Of one block."""
        return self.block_size * self.hidden_size * self.dtype.itemsize

    def describe(self) -> dict[str, object]:
        """What decides the meaning of stored inputs."""
        return {"name": self.name, "hidden_size": self.hidden_size, "dtype": str(self.dtype)}
