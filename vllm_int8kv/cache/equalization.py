"""Key equalization: one factor per channel that divides K and multiplies Q, so that `q . k` is unchanged.

The codes of a vector share one step, proportional to its largest element, so in the score sum(q_d k_d) every channel
adds an error of q_d e_d times a step proportional to |k / e|, where e are the factors. Rotation makes the steps follow
the length of k / e rather than its largest element, and the expected squared error of a score is proportional to

    sum(E[k_d^2] / e_d^2) * sum(E[q_d^2] e_d^2)  >=  sum(sqrt(E[k_d^2] E[q_d^2]))^2       (Cauchy-Schwarz)

with equality at e_d = sqrt(rms(k_d) / rms(q_d)), the balance between keys and queries that `key_equalizer` returns.
The bound does not change when a channel of K is scaled by c and the same channel of Q by 1 / c, and neither does a
bit of the cache: the factor takes up c.

The root mean squares come from one forward pass over random tokens when the model has been loaded
(`serving/calibration.py`). It needs no data and knows nothing of the model's structure: it sees Q and K as they reach
the cache, after biases, norms, RoPE and tensor parallel sharding. Any factors leave q . k as it is, so a poor estimate
costs accuracy, never correctness.
"""

import torch

MAX_EXPONENT = 30
NUM_TOKENS = 256
"""Of the calibration pass."""
MAX_POSITION = 4096


def calibration_positions(num_positions: int) -> torch.Tensor:
    """Where the random tokens of the calibration pass stand: ever farther apart, up to position 4095.

    RoPE turns slow pairs of channels so little over the first few hundred positions that their root mean squares
    there are not those of a longer context. KL per token on SmolLM2, four texts of 2048 tokens, as a share of that
    of plain INT8: 0.36 with positions 0 to 255, 0.28 with 0 to 2040 in steps of 8, 0.28 with these, 0.32 with these
    up to 8191, and no better with twice the tokens.

    Args:
        num_positions: that the model itself has, whatever an engine allows: factors depend on the model alone.

    Returns:
        [min(256, num_positions)] int64, strictly increasing from 0.
    """
    num_tokens = min(NUM_TOKENS, num_positions)
    last = min(MAX_POSITION, num_positions) - 1
    index = torch.arange(num_tokens, device="cpu")
    # last * (i / n)^2, but at least i, so that no two tokens share a position.
    squares = torch.div(last * index.square(), max(num_tokens - 1, 1) ** 2, rounding_mode="floor")
    return squares.maximum(index)


def calibration_token_ids(num_tokens: int, vocab_size: int) -> torch.Tensor:
    """The random tokens themselves, `[num_tokens]` int64: always the same, so engines of one model agree."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(vocab_size, (num_tokens,), generator=generator, device="cpu")


def key_equalizer(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The factors that balance keys and queries, as powers of two.

    Powers of two cost no accuracy (KL on SmolLM2 1.76e-4 against 1.87e-4 without rounding and 2.41e-4 without
    factors) and make dividing K and multiplying Q exact.

    Args:
        query: [num_tokens, num_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size].

    Returns:
        [num_kv_heads, head_size] fp32; 1 where a channel is always 0 or not finite.
    """
    num_kv_heads, head_size = key.shape[1:]
    k_squares = key.double().square().mean(dim=0)
    q_squares = query.double().square().mean(dim=0).view(num_kv_heads, -1, head_size).mean(dim=1)
    exponents = torch.log2(k_squares / q_squares) / 4
    exponents = torch.where(exponents.isfinite(), exponents, 0.0).round().clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.exp2(exponents).float()
