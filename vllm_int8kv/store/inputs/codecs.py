"""Codecs of the inputs of layers (XQuant, arXiv 2508.10395).

    x           as they are
    x8          8 bits per channel, a scale per group of channels of a token
    xcl8        the same of what is left when the input of the layer before has been subtracted
    xbound:R    as xcl, in steps of R times the root mean square of a token, entropy-coded per channel

Scales follow the token, and errors the channel: what is rounded is equalized, and rotated where all channels have the
same number of bits (`factors`). `xsvd:R` is in `latents`.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic

import numpy as np
import torch

from vllm_int8kv.cache.formats import CODES
from vllm_int8kv.cache.key_transform import hadamard_rotate
from vllm_int8kv.cache.quantizer import SCALE_DTYPE, Quantized, quantize, sanitize
from vllm_int8kv.store.bounded import Reader, Writer, steps_of
from vllm_int8kv.store.channels import dequantize_channels
from vllm_int8kv.store.codecs import Codec, LayerCodec, Payload
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.inputs.factors import Factors
from vllm_int8kv.store.inputs.kept import DIGEST_BYTES, K, KeptInFolder
from vllm_int8kv.store.inputs.layers import InputLayer

ROTATION_BLOCK = 64
"""Channels that are rotated together; more would cost a pass over the inputs for each factor of two."""
MAX_GROUP_BLOCKS = 4
"""Blocks of channels that share a scale, at most. Less would cost more bytes than it gains."""
FIRST_LAYERS, FIRST_BITS = 3, 8
"""Layers of the codecs `xcl` from which all later ones begin, and their bits. With 4 bits for them, as in the paper,
their errors are in all layers: with 8 bits in the others KL is 9.4e-3, not 6.7e-5."""


class ExactInputs(LayerCodec):
    """Inputs as they are."""

    def layer_bytes(self, layer: InputLayer) -> int:
        return layer.page_bytes

    def encode_layer(self, layer: InputLayer, pages: torch.Tensor) -> torch.Tensor:
        return pages

    def decode_layer(self, layer: InputLayer, rows: torch.Tensor) -> torch.Tensor:
        return rows.contiguous().view(layer.dtype).reshape(-1, layer.block_size, layer.hidden_size)


class KnowingCodec(Codec, Generic[K]):
    """The base of codecs that know something beforehand.

    A payload begins with the digest of that, so that one made with something else is none of this codec.
    """

    def __init__(self, layers: Sequence[InputLayer], kept: KeptInFolder[K]) -> None:
        super().__init__(layers)
        self._kept = kept

    @abstractmethod
    def encode_with(self, known: K, inputs: Sequence[torch.Tensor]) -> list[Payload]:
        """Payloads of finite inputs, of every layer `[num_blocks, block_size, hidden_size]` fp32."""

    @abstractmethod
    def decode_with(self, known: K, payloads: Sequence[memoryview]) -> list[torch.Tensor]:
        """The inverse of `encode_with`.

        Raises:
            BadFile: a payload is none of this codec.
        """

    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        known = self._kept.known_or_measured(pages)
        payloads = self.encode_with(known, [sanitize(part) for part in pages])
        return [known.digest + bytes(payload) for payload in payloads]

    def decode(self, payloads: Sequence[Payload]) -> list[torch.Tensor]:
        known = self._kept.known()
        payloads = [memoryview(payload) for payload in payloads]
        if any(payload[:DIGEST_BYTES] != known.digest for payload in payloads):
            raise BadFile(f"its payload was made with other {known.name}")
        return self.decode_with(known, [payload[DIGEST_BYTES:] for payload in payloads])


class PredictedInputs(KnowingCodec[Factors]):
    """The base of codecs that round what is left when something has been predicted, in factors' units."""

    @abstractmethod
    def decode_rests(self, payloads: Sequence[memoryview]) -> Iterable[torch.Tensor]:
        """What was left of the inputs, multiplied by the equalizers.

        Raises:
            BadFile: a payload is none of this codec.
        """

    def decode_with(self, known: Factors, payloads: Sequence[memoryview]) -> list[torch.Tensor]:
        previous, found = torch.zeros(1), []
        for layer, rest in enumerate(self.decode_rests(payloads)):
            own = rest.mul_(1 / known.equalizers[layer])
            if known.predicts:
                own.addcmul_(previous, known.predictors[layer])
            found.append(own)
            previous = own
        return found


class QuantizedInputs(PredictedInputs):
    """Codes of few bits, scales, and below 8 bits midpoints, laid out as the cache does with V.

    Args:
        bits: of a code.
        first_bits: of the first layers.
    """

    def __init__(
        self, layers: Sequence[InputLayer], factors: KeptInFolder[Factors], bits: int, first_bits: int
    ) -> None:
        super().__init__(layers, factors)
        self._bits = [bits if place >= FIRST_LAYERS else first_bits for place in range(len(layers))]
        layer = layers[0]
        self._block = min(ROTATION_BLOCK, layer.hidden_size & -layer.hidden_size)
        # A product takes a third of the time of additions and subtractions, each a pass over the inputs.
        self._rotation = hadamard_rotate(torch.eye(self._block))
        num_blocks = layer.hidden_size // self._block
        blocks = max(n for n in range(1, MAX_GROUP_BLOCKS + 1) if num_blocks % n == 0)
        self._shape = (layer.block_size, num_blocks // blocks, blocks * self._block)
        """Of a block of one layer: tokens, groups, channels."""

    def encode_with(self, known: Factors, inputs: Sequence[torch.Tensor]) -> list[Payload]:
        restored, encoded = torch.zeros(()), []
        for layer, (x, bits) in enumerate(zip(inputs, self._bits, strict=True)):
            predicted = known.predictors[layer] * restored
            rest = self._rotated((x - predicted) * known.equalizers[layer])
            quantized = quantize(rest.view(-1, *self._shape), bits)
            encoded.append(self._pack(quantized, bits))
            if known.predicts:
                rounded = self._rotated(quantized.dequantize(bits).reshape(x.shape))
                restored = rounded / known.equalizers[layer] + predicted
        return [memoryview(row.numpy()) for row in torch.cat(encoded, dim=1)]

    def decode_rests(self, payloads: Sequence[memoryview]) -> Iterable[torch.Tensor]:
        num_tokens, num_groups, _ = self._shape
        sizes = [self._code_bytes(bits) + num_tokens * num_groups * CODES[bits].param_bytes for bits in self._bits]
        if wrong := [len(payload) for payload in payloads if len(payload) != sum(sizes)]:
            raise BadFile(f"its payload has {wrong[0]} bytes, expected {sum(sizes)}")
        rows = torch.from_numpy(np.stack([np.frombuffer(payload, np.int8) for payload in payloads]))
        shape = (len(payloads), num_tokens, self.layers[0].hidden_size)
        return [
            self._rotated(self._unpack(part, bits).dequantize(bits).reshape(shape))
            for part, bits in zip(rows.split(sizes, dim=1), self._bits, strict=True)
        ]

    def _code_bytes(self, bits: int) -> int:
        num_tokens, num_groups, width = self._shape
        return num_groups * CODES[bits].v_bytes(num_tokens, width)

    def _pack(self, quantized: Quantized, bits: int) -> torch.Tensor:
        """Bytes of blocks of `[num_blocks, tokens, groups, channels]`."""
        parts = [
            CODES[bits].pack_v(quantized.codes.transpose(1, 2)),
            *(p.contiguous().view(torch.int8) for p in quantized.params),
        ]
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)

    def _unpack(self, rows: torch.Tensor, bits: int) -> Quantized:
        """The inverse of `_pack`."""
        num_tokens, num_groups, width = self._shape
        code_bytes, vector = self._code_bytes(bits), num_tokens * num_groups * SCALE_DTYPE.itemsize
        codes = rows[:, :code_bytes].reshape(len(rows), num_groups, -1)
        params = rows[:, code_bytes:].split(vector, dim=1)
        return Quantized(
            CODES[bits].unpack_v(codes, num_tokens, width).transpose(1, 2),
            *(p.contiguous().view(SCALE_DTYPE).view(len(rows), num_tokens, num_groups) for p in params),
        )

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotated in blocks of channels, which is its own inverse."""
        return (x.reshape(-1, self._block) @ self._rotation).view(x.shape)


class BoundedInputs(PredictedInputs):
    """Multiples of the step of their token, which is a share of the root mean square of its equalized inputs.

    Args:
        relative_step: R of `xbound:R`.
    """

    def __init__(self, layers: Sequence[InputLayer], factors: KeptInFolder[Factors], relative_step: float) -> None:
        super().__init__(layers, factors)
        self._relative_step = relative_step
        self._widths = [layer.hidden_size for layer in layers]
        self._reader = Reader(self._widths, layers[0].block_size)

    def encode_with(self, known: Factors, inputs: Sequence[torch.Tensor]) -> list[Payload]:
        writer = Writer(len(inputs[0]), self._widths, self.layers[0].block_size)
        previous = torch.zeros(())
        for layer, x in enumerate(inputs):
            equalizer = known.equalizers[layer]
            predicted = known.predictors[layer] * previous
            rest = writer.add((x - predicted) * equalizer, steps_of(x * equalizer, self._relative_step))
            previous = dequantize_channels(*rest) / equalizer + predicted
        return writer.payloads()

    def decode_rests(self, payloads: Sequence[memoryview]) -> Iterator[torch.Tensor]:
        for multiples, steps in self._reader.read_whole(payloads):
            yield dequantize_channels(multiples, steps)
