"""Counter-based random numbers: the draw at a counter depends on the key alone, never on other draws.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in int64
tensor arithmetic, so that it runs on any device, has no state and gives one image the same numbers in every batch.
"""

import torch
from torch import Tensor

from unperturb.models.shapes import Float, Int

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four 32-bit words per counter.

    `counter` and `key` are int64 tensors holding 32-bit words, broadcastable with one another.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]  # wraps modulo 2**64; the shifts below mask the sign away
        product1 = c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def gaussian(seeds: Int[Tensor, " batch"], step: int, stream: int, count: int) -> Float[Tensor, "batch count"]:
    """Return `count` draws of the standard normal distribution per image, within 4.9 of 0; see `uniform`."""
    draws = uniform(seeds, step, stream, count)
    return torch.erfinv((2 * draws - 1).clamp(-0.999999, 0.999999)) * 2**0.5


def uniform(
    seeds: Int[Tensor, " batch"],
    step: int | Int[Tensor, " batch"],
    stream: int | Int[Tensor, " batch"],
    count: int,
) -> Float[Tensor, "batch count"]:
    """Return `count` float32 numbers in [0, 1) per image, a function of (seed, step, stream, place) only.

    `step` is one number for all or one per image; `stream`, likewise, keeps uses of one seed apart (a view's number, a
    start).
    """
    steps, streams = (
        (number.expand_as(seeds) if isinstance(number, Tensor) else torch.full_like(seeds, number))[:, None]
        for number in (step, stream)
    )  # a number is filled in on the device: copied there it could not be captured in a graph
    blocks = torch.arange((count + 3) // 4, device=seeds.device)[None]  # 1 blocks
    zero = torch.zeros_like(blocks)
    words = philox(
        (blocks, steps & _WORD, streams, zero),
        ((seeds & _WORD)[:, None], ((seeds >> 32) & _WORD)[:, None]),
    )
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]
    return (bits >> 8).float() * 2.0**-24  # 24 bits: the most that float32 holds without rounding up to 1
