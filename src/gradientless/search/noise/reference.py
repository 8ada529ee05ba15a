"""The noise function in readable torch: the specification that every faster backend equals bit for bit.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3), keyed by seed and
hashed name, counted by step, draw and element. Nothing is sequential: entry i of a tensor costs the same whichever
other entries are asked for.

    key     = blake2b(f"{seed}\\0{name}", 8 bytes), two little-endian words
    counter = (block mod 2^32, stream << 24 | block >> 32, step, draw)

where `block` counts groups of entries: 4 for Gaussian and near-normal values, 128 for Rademacher signs.

Gaussian values come from the Box-Muller transform with logarithm, sine and cosine as fixed polynomials of single
precision. Every operation is an IEEE addition, multiplication or square root, rounded once each and never fused, so
the values have the same bits wherever that arithmetic is kept. The largest |z| is sqrt(48 ln 2) = 5.77.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

RADEMACHER, GAUSSIAN, NEAR_NORMAL, SELECT, FISHER, ROUND = range(6)
STREAMS = {"rademacher": RADEMACHER, "gaussian": GAUSSIAN, "near_normal": NEAR_NORMAL}
GROUP = {"rademacher": 128, "gaussian": 4, "near_normal": 4}  # entries that one counter serves

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


@lru_cache(maxsize=65536)
def key_of(seed: int, name: str) -> tuple[int, int]:
    """The two key words of tensor (or block) `name` under `seed`."""
    digest = hashlib.blake2b(f"{seed}\x00{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of constant * x; by halves, since int64 cannot hold the 64-bit product."""
    low, high = x & 0xFFFF, x >> 16
    middle = constant * high + ((constant * low) >> 16)
    return (middle >> 16) & _MASK, ((middle << 16) | ((constant * low) & 0xFFFF)) & _MASK


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Philox 4x32-10 of int64 tensors that hold 32-bit words; returns [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply(_M0, c0)
        hi1, lo1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def words(seed: int, name: str, stream: int, step: int, draw: int, block: Tensor) -> Tensor:
    """The four words at each of `block` (int64 [...]): [..., 4] int64 in [0, 2^32)."""
    counter = (
        block & _MASK,
        (stream << 24) | (block >> 32),
        torch.full_like(block, step & _MASK),
        torch.full_like(block, draw & _MASK),
    )
    return philox(key_of(seed, name), counter)


def values(distribution: str, seed: int, name: str, step: int, draw: int, index: Tensor) -> Tensor:
    """Noise at flat positions `index` (int64 [s]) of tensor `name`: float32 [s], mean 0 and variance 1."""
    group = GROUP[distribution]
    out = words(seed, name, STREAMS[distribution], step, draw, index // group)
    place = index % group
    if distribution == "rademacher":
        word = out.gather(-1, (place // 32).unsqueeze(-1)).squeeze(-1)
        return (1 - 2 * ((word >> (place % 32)) & 1)).float()
    if distribution == "near_normal":
        word = out.gather(-1, place.unsqueeze(-1)).squeeze(-1)
        return (_popcount(word) - 16).float() * torch.tensor(0.35355338, dtype=torch.float32)  # 1/sqrt(8)
    pair = (place // 2 * 2).unsqueeze(-1)
    radius, cosine, sine = _box_muller(out.gather(-1, pair).squeeze(-1), out.gather(-1, pair + 1).squeeze(-1))
    return radius * torch.where(place % 2 == 0, cosine, sine)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # torch's single-precision square root may come from a vector library that is off by one bit; through double
    # precision the result is correctly rounded, as IEEE hardware has it.
    radius = torch.sqrt((-2.0 * _log(a)).double()).float()
    return radius, *_cosine_sine(b)


def run(
    distribution: str,
    seed: int,
    name: str,
    step: int,
    draw: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`values` at [start, start + count): the same bits with every counter computed once, not once an entry."""
    group = GROUP[distribution]
    blocks = torch.arange(start // group, -(-(start + count) // group), device=device)
    out = words(seed, name, STREAMS[distribution], step, draw, blocks)
    if distribution == "rademacher":
        found = (1 - 2 * ((out.unsqueeze(-1) >> torch.arange(32, device=device)) & 1)).float()
    elif distribution == "near_normal":
        found = (_popcount(out) - 16).float() * torch.tensor(0.35355338, dtype=torch.float32)  # 1/sqrt(8)
    else:
        radius, cosine, sine = _box_muller(out[:, 0::2], out[:, 1::2])
        found = torch.stack([radius * cosine, radius * sine], dim=-1)
    skip = start % group
    return found.flatten()[skip : skip + count]


def rounding_run(
    seed: int, name: str, step: int, draw: int, start: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """`rounding` at [start, start + count), likewise."""
    blocks = torch.arange(start // 8, -(-(start + count) // 8), device=device)
    out = words(seed, name, ROUND, step, draw, blocks)
    halves = (out.unsqueeze(-1) >> torch.tensor([0, 16], device=device)) & 0xFFFF
    return halves.flatten()[start % 8 : start % 8 + count].int()


def rounding(seed: int, name: str, step: int, draw: int, index: Tensor) -> Tensor:
    """Half a word of the stream ROUND for each of `index` (int64 [s]): eight entries a counter; int32 in [0, 2^16)."""
    out = words(seed, name, ROUND, step, draw, index // 8)
    word = out.gather(-1, (index % 8 // 2).unsqueeze(-1)).squeeze(-1)
    return ((word >> (index % 2 * 16)) & 0xFFFF).int()


def round_stochastically(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (float32) in `dtype` (bfloat16 or float16), up or down with the odds of their place between neighbours.

    bits: int32 in [0, 2^16), uniform, one for each value. The mean over bits is the value to 2^-16 of the neighbours'
    distance (2^-13 for normal float16). Values that are not finite pass as they are.
    """
    raw = values.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((raw + bits) & -0x10000).view(torch.float32)
    else:
        rounded = ((raw + (bits >> 3)) & -0x2000).view(torch.float32)
        scaled = values * 2.0**24  # below 2^-14 float16 has a fixed distance of 2^-24
        lower = scaled.floor()
        small = (lower + (scaled - lower > bits.float() * 2.0**-16).float()) * 2.0**-24
        rounded = torch.where(values.abs() < 2.0**-14, small, rounded)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def _popcount(word: Tensor) -> Tensor:
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) & _MASK) >> 24


# Minimax coefficients for single precision, highest power first.
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF = 0.70710677
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
TURN = 3.7450703e-7  # 2 pi 2^-24


def _log(word: Tensor) -> Tensor:
    """ln(((word >> 8) + 1) 2^-24), float32."""
    fraction, exponent = torch.frexp(((word >> 8) + 1).float())
    small = fraction < SQRT_HALF
    x = torch.where(small, fraction + fraction, fraction) - 1.0
    e = (exponent - small.int() - 24).float()
    z = x * x
    p = torch.full_like(x, LOG[0])
    for coefficient in LOG[1:]:
        p = p * x + coefficient
    y = x * z * p
    y = y + e * LN2_LOW
    y = y - 0.5 * z
    return x + y + e * LN2_HIGH


def _cosine_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi (word >> 8) 2^-24, float32."""
    angle = word >> 8
    quadrant = (angle + (1 << 21)) >> 22
    t = (angle - (quadrant << 22)).float() * TURN
    z = t * t
    sine = ((SIN[0] * z + SIN[1]) * z + SIN[2]) * z * t + t
    cosine = ((COS[0] * z + COS[1]) * z + COS[2]) * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) == 1
    c, s = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    c = torch.where(((quadrant + 1) & 2) == 2, -c, c)
    s = torch.where((quadrant & 2) == 2, -s, s)
    return c, s


def round_keys(seed: int, name: str, step: int) -> list[int]:
    """The eight round keys of the permutation from which the selection of (name, step) is read."""
    return words(seed, name, SELECT, step, 0, torch.arange(2)).flatten().tolist()


def select(seed: int, name: str, step: int, size: int, count: int) -> Tensor:
    """`count` distinct positions of range(size), sorted: the first values of a keyed permutation.

    A Feistel network of eight rounds over the next even power of two, walked until the value falls below `size`
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002); so it takes time and memory for `count`
    values, not for `size`. Returns int64 [count].
    """
    half = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    mask = (1 << half) - 1
    keys = round_keys(seed, name, step)
    x = _feistel(torch.arange(count), keys, half, mask)
    outside = x >= size
    while bool(outside.any()):
        x[outside] = _feistel(x[outside], keys, half, mask)
        outside = x >= size
    return x.sort().values


def _feistel(x: Tensor, keys: list[int], half: int, mask: int) -> Tensor:
    left, right = x >> half, x & mask
    for key in keys:
        h = (right ^ key) & _MASK
        h = h ^ (h >> 16)
        h = _multiply(0x85EBCA6B, h)[1]
        h = h ^ (h >> 13)
        h = _multiply(0xC2B2AE35, h)[1]
        h = h ^ (h >> 16)
        left, right = right, left ^ (h & mask)
    return (left << half) | right
