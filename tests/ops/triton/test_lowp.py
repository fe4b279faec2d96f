"""Low-precision helpers: every code, and rounding as torch does it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from tests.ops.triton.card import DEVICE
from torch import Tensor

from tenfold.ops import reference
from tenfold.ops.triton.lowp import (
    e2m1,
    e2m1_code,
    e4m3,
    e4m3_code,
    e8m0,
    mm_f32,
    mm_split,
    pow2_ceil_scale,
    pow2_inverse,
    round_bf16,
    round_e4m3,
    to_bf16,
)

CODES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def decode(codes, as_e4m3, as_e2m1, as_e8m0, N: tl.constexpr):
    i = tl.arange(0, N)
    code = tl.load(codes + i)
    tl.store(as_e4m3 + i, e4m3(code))
    tl.store(as_e2m1 + i, e2m1(code))
    tl.store(as_e8m0 + i, e8m0(code))


@triton.jit
def encode(numbers, rounded, codes, small_codes, halves, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(numbers + i)
    y = round_e4m3(x)
    tl.store(rounded + i, y)
    tl.store(codes + i, e4m3_code(x, y))
    tl.store(small_codes + i, e2m1_code(x))
    tl.store(halves + i, to_bf16(x))


@triton.jit
def scale(numbers, scales, inverses, codes, N: tl.constexpr):
    i = tl.arange(0, N)
    power, code = pow2_ceil_scale(tl.load(numbers + i), 1.0 / 448.0)
    tl.store(scales + i, power)
    tl.store(inverses + i, pow2_inverse(power))
    tl.store(codes + i, code)


@triton.jit
def product(a, b, split1, split3, full, high, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    x, w, zero = tl.load(a + place), tl.load(b + place), tl.zeros([N, N], tl.float32)
    tl.store(split1 + place, mm_split(x, w, zero, 1))
    tl.store(split3 + place, mm_split(x, w, zero, 3))
    tl.store(full + place, mm_f32(x, w, zero))
    tl.store(high + place, round_bf16(x))


def launched(kernel: Any, n: int, *given: Tensor | None) -> list[Tensor]:
    """A kernel of one program on memory of the device; what comes back from there. None: n float32, full of NaN."""
    there = [(torch.full((n,), torch.nan) if tensor is None else tensor).to(DEVICE) for tensor in given]
    kernel[(1,)](*there, n)
    return [tensor.cpu() for tensor in there]


def test_every_code_reads_as_its_number() -> None:
    _, eights, fours, powers = launched(decode, 256, CODES, None, None, None)
    expected = CODES.view(torch.float8_e4m3fn).float()
    finite = ~expected.isnan()
    assert finite.sum() == 254
    assert torch.equal(eights[finite], expected[finite])
    assert torch.equal(fours, reference._e2m1_values()[(CODES & 15).long()])
    assert torch.equal(powers[:255], reference._e8m0_values()[:255])


def test_numbers_are_rounded_as_torch_does_it() -> None:
    n = 1 << 16
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(3, n // 4, generator=generator) * torch.tensor([[100.0], [1.0], [0.004]])
    x = torch.cat([*spread, torch.arange(n // 4) / 1024 - 8]).clamp(-448, 448)  # the last: ties of both formats
    x[0], x[1] = 0.0, -0.0
    octets, halves = torch.empty(n, dtype=torch.uint8), torch.empty(n, dtype=torch.bfloat16)
    _, rounded, codes, small_codes, halves = launched(encode, n, x, None, octets, octets.clone(), halves)
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(rounded, expected.float())
    assert torch.equal(codes, expected.view(torch.uint8))
    assert torch.equal(halves, x.bfloat16())
    assert torch.equal(small_codes, reference.e2m1_codes(x))


def test_scales_are_the_reference_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(1000, generator=generator) * 100 + 1e-4, 448 * torch.exp2(torch.arange(24) - 12.0)])
    _, scales, inverses, codes = launched(scale, 1024, x, None, None, torch.empty(1024, dtype=torch.uint8))
    exponents = reference._scale_exponents(x, 448.0)
    assert torch.equal(codes.long(), exponents)
    assert torch.equal(scales, reference._e8m0_values()[exponents])
    assert torch.equal(inverses, 1 / scales)


def test_products_round_activations_or_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(32, 32, generator=generator) for _ in range(2))
    w = w.bfloat16().float()
    empty = [torch.full((32, 32), torch.nan) for _ in range(4)]
    _, _, split1, split3, full, high = launched(product, 32, x, w, *empty)
    assert torch.equal(high, x.bfloat16().float())
    rounded, exact = high.double() @ w.double(), x.double() @ w.double()
    sizes = x.double().abs() @ w.double().abs()
    for found, expected in ((split1, rounded), (split3, exact), (full, exact)):
        assert ((found - expected).abs() <= 5e-7 * sizes).all()
    assert ((split1 - exact).abs() <= 2**-8 * sizes).all()
