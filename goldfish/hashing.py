"""The arithmetic of `goldfish.spec` on whole tensors.

Only integers, and only operations with the same result on every device, in eager mode and under
torch.compile. torch has no uint64 arithmetic, but int64 wraps around, so its bits are the same: of
sums and products the low 64 bits do not depend on the sign. Only shifts and comparisons do.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish import spec


def signed(x: int) -> int:
    """The int64 with the same 64 bits as the unsigned `x`.

    >>> signed(5), signed(2**64 - 1)
    (5, -1)
    """
    x &= spec.WORD
    if x < 2**63:
        return x
    return x - 2**64


# The constants of splitmix64, as in `spec.mix`.
_GAMMA = signed(0x9E3779B97F4A7C15)
_MIX_A = signed(0xBF58476D1CE4E5B9)
_MIX_B = signed(0x94D049BB133111EB)
MULTIPLIER = signed(spec.MULTIPLIER)
# MULTIPLIER * INVERSE == 1 modulo 2**64
INVERSE = signed(pow(spec.MULTIPLIER, -1, 2**64))


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64. torch's own `>>` copies the sign bit, so -1 >> 1 is -1."""
    # The copies of the sign fill the top `bits` bits, which this clears.
    low_bits = (1 << (64 - bits)) - 1
    return (x >> bits) & low_bits


def mix(x: Tensor) -> Tensor:
    """`spec.mix` of every element; int64 in, int64 out.

    >>> mix(torch.tensor([0])).item() == signed(spec.mix(0))
    True
    """
    z = x + _GAMMA
    z = z ^ shift_right(z, 30)
    z = z * _MIX_A
    z = z ^ shift_right(z, 27)
    z = z * _MIX_B
    return z ^ shift_right(z, 31)


def powers(base: int, count: int, device: torch.device) -> Tensor:
    """base**0 ... base**(count - 1), modulo 2**64; int64 (count,)."""
    # The running product of [1, base, base, ...] wraps around in int64.
    table = torch.full((count,), base, dtype=torch.int64, device=device)
    table[:1] = 1
    return table.cumprod(0)


def previous(values: Tensor) -> Tensor:
    """The value one column before, 0 in the first column: [5, 6, 7] becomes [0, 5, 6]."""
    return pad(values[..., :-1], (1, 0))


def prefix_hashes(symbols: Tensor) -> Tensor:
    """Prefix sums from which `window_hashes` reads any window; int64 (B, T) -> (B, T + 1).

    One pass over the tokens, whatever the length of the windows. With M the multiplier, M' its
    inverse, and the symbols a, b, c, d, the prefix sums are

        P[0] = 0, P[1] = a M', P[2] = a M' + b M'^2, P[3] = a M' + b M'^2 + c M'^3, ...

    and the window [b, c], whose hash is b M + c (Horner's rule, newest symbol last), is

        M^3 (P[3] - P[1]) = M^3 (b M'^2 + c M'^3) = b M + c.
    """
    length = symbols.shape[-1]
    weights = powers(INVERSE, length + 1, symbols.device)
    weighted = symbols * weights[1:]
    return pad(weighted.cumsum(-1), (1, 0))


def window_hashes(prefix: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """The hash of symbols[begin:end] for every element of begin and end, int64 (B, N)."""
    scale = powers(MULTIPLIER, prefix.shape[-1], prefix.device)
    # Differences wrap around like everything else, so it does not matter which sum is larger.
    difference = prefix.gather(-1, end) - prefix.gather(-1, begin)
    return difference * scale[end]


def hits(keys: Tensor, limit: int) -> Tensor:
    """True where the top 32 bits of a key are below `limit`; bool of the shape of keys."""
    return shift_right(keys, 32) < limit
