"""The arithmetic of `goldfish.spec` on whole tensors: int64 with wrap-around is uint64 arithmetic.

Only integers, and only operations with the same result on every device, in eager mode and under torch.compile.
"""

import torch
from torch import Tensor

from goldfish import spec


def signed(x: int) -> int:
    """The int64 with the same 64 bits as the unsigned `x`."""
    x &= spec.WORD
    return x - 2**64 if x >= 2**63 else x


_GAMMA, _MIX_A, _MIX_B = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
MULTIPLIER = signed(spec.MULTIPLIER)
INVERSE = signed(pow(spec.MULTIPLIER, -1, 2**64))


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's own `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """`spec.mix` of every element; int64 in, int64 out."""
    z = x + _GAMMA
    z = (z ^ shift_right(z, 30)) * _MIX_A
    z = (z ^ shift_right(z, 27)) * _MIX_B
    return z ^ shift_right(z, 31)


def powers(base: int, count: int, device: torch.device) -> Tensor:
    """base**0 ... base**(count - 1), modulo 2**64; int64 (count,)."""
    table = torch.full((count,), base, dtype=torch.int64, device=device)
    table[:1] = 1
    return table.cumprod(0)


def prefix_hashes(symbols: Tensor) -> Tensor:
    """Prefix sums (B, T + 1) from which `window_hashes` reads any window; symbols int64 (B, T).

    The polynomial hash of symbols[a:b], newest symbol times M**0, is M**b * (P[b] - P[a]) with
    P[i] = sum over j < i of symbols[j] * M**-(j + 1): one pass over the tokens, whatever the window's length.
    """
    length = symbols.shape[-1]
    weighted = symbols * powers(INVERSE, length + 1, symbols.device)[1:]
    return torch.nn.functional.pad(weighted.cumsum(-1), (1, 0))


def window_hashes(prefix: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """The polynomial hash of symbols[begin:end] for every element of begin and end, int64 (B, N)."""
    scale = powers(MULTIPLIER, prefix.shape[-1], prefix.device)
    return (prefix.gather(-1, end) - prefix.gather(-1, begin)) * scale[end]


def below(keys: Tensor, limit: int) -> Tensor:
    """True where the top 32 bits of a key are less than `limit` (`spec.threshold(k)`): one time in k."""
    return shift_right(keys, 32) < limit
