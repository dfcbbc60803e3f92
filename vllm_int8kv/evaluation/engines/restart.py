"""Runs of a model that begin behind its first blocks, where only later ones differ from a run before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.utils import extract_layer_index


class RestartableModel:
    """A model whose blocks can give back what they gave in a run that was kept.

    The blocks are the submodules that hold one attention layer each, as `model.layers.3`. A model that does more than
    hand the outputs of one block to the next cannot be restarted; `check` finds out.

    It runs outside of any batch: attention layers get no metadata, and give zeros.

    Args:
        model: as vLLM has loaded it.
        layer_names: of the attention layers.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, layer_names: Sequence[str]) -> None:
        self._model, self._vllm_config = model, vllm_config
        self.can_restart = True
        self._kept: dict[int, dict[int, Any]] = {}
        """Outputs of blocks by index, by the number of the prompt."""
        self._prompt, self._first, self._is_keeping = 0, 0, False
        for name in layer_names:
            index = extract_layer_index(name)
            path = name.split(".")
            block = model.get_submodule(".".join(path[: path.index(str(index)) + 1]))
            block.forward = self._wrap(index, block.forward)

    def _wrap(self, index: int, forward: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if index < self._first:
                # Later blocks write into what they get; nobody reads what the ones before the last skipped one return.
                kept = self._kept[self._prompt][index]
                return _copy(kept) if index == self._first - 1 else kept
            output = forward(*args, **kwargs)
            if self._is_keeping:
                self._kept.setdefault(self._prompt, {})[index] = _copy(output)
            return output

        return wrapper

    def keep(self, prompt: int, input_ids: torch.Tensor) -> torch.Tensor:
        """Run all of a prompt, and keep what its blocks give."""
        self._is_keeping = True
        try:
            return self.run(prompt, input_ids)
        finally:
            self._is_keeping = False

    def run(self, prompt: int, input_ids: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The last hidden states of a prompt.

        Args:
            prompt: its number in `keep`, if it was kept.
            first: the blocks before it do what they did then.
        """
        self._prompt = prompt
        self._first = first if self.can_restart and prompt in self._kept else 0
        try:
            return self._run(input_ids)
        finally:
            self._first = 0

    def _run(self, input_ids: torch.Tensor) -> torch.Tensor:
        config = self._vllm_config
        device = config.device_config.device
        input_ids, positions = input_ids.to(device), torch.arange(len(input_ids), device=device)
        if config.model_config.uses_mrope:
            positions = positions.expand(3, -1)
        options = {"num_tokens": len(input_ids), "slot_mapping": {}, "skip_compiled": True}
        with torch.inference_mode(), set_forward_context(None, config, **options):
            return self._model(input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)

    def check(self, prompt: int, input_ids: torch.Tensor, middle: int) -> None:
        """Give up restarts if one at `middle` does not end as the whole run does, bit for bit."""
        restarted = self.run(prompt, input_ids, middle)
        if not self.can_restart or not torch.equal(restarted, self.run(prompt, input_ids)):
            self.can_restart = False
            self._kept.clear()


def _copy(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    return type(output)(_copy(item) for item in output) if isinstance(output, tuple | list) else output
