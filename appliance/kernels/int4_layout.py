"""How 4-bit weights lie in memory: eight consecutive inner positions k0..k7 of a row share an int32, whose nibble i
(bits 4i to 4i + 3) holds position NIBBLES[i].

So `(word >> 4 * j) & 0x000F000F` for j = 0..3 gives the pairs (k0, k1), (k2, k3), (k4, k5), (k6, k7), the even one in
the low half: a kernel turns them into two 16-bit floats at a time and has them in order. Plain torch, any device; knows
nothing of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8  # values of an int32
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of a word's eight positions nibble i holds


def pack(values: Tensor) -> Tensor:
    """uint8 [out, in] of 0..15 -> int32 [out, in // 8]. `in` must be a multiple of 8."""
    assert values.shape[-1] % PER_WORD == 0, values.shape
    grouped = values.unflatten(-1, (-1, PER_WORD))
    words = torch.zeros(grouped.shape[:-1], dtype=torch.int32, device=values.device)
    for nibble, position in enumerate(NIBBLES):
        words |= grouped[..., position].to(torch.int32) << 4 * nibble
    return words


def unpack(words: Tensor) -> Tensor:
    """The inverse of `pack`: int32 [out, in // 8] -> uint8 [out, in]."""
    values = torch.empty(*words.shape, PER_WORD, dtype=torch.uint8, device=words.device)
    for nibble, position in enumerate(NIBBLES):
        values[..., position] = ((words >> 4 * nibble) & 15).to(torch.uint8)
    return values.flatten(-2)
