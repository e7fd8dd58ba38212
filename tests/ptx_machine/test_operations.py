"""What instructions compute, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_machine import InexactInstructionError, UnknownInstructionError
from ptx_machine.operations import operation
from ptx_machine.scalars import SCALARS
from ptx_testing import compute

INF, NAN = np.inf, np.nan
TINY = 2.0**-149  # the least float32

#: Opcode; types of the result and of the operands; operands, one list each; results.
ARITHMETIC = [
    ("add.s32", "s32 s32 s32", [[1, 2**31 - 1], [2, 1]], [3, -(2**31)]),
    ("add.s64", "s64 s64 s64", [[-1], [2**63 - 1]], [2**63 - 2]),
    ("sub.s64", "s64 s64 s64", [[1], [3]], [-2]),
    ("sub.u16", "u16 u16 u16", [[1], [3]], [0xFFFE]),
    ("neg.s32", "s32 s32", [[5, -(2**31)]], [-5, -(2**31)]),
    ("abs.s32", "s32 s32", [[-5, 5]], [5, 5]),
    ("mul.lo.s32", "s32 s32 s32", [[0x10000], [0x10001]], [0x10000]),
    ("mul.hi.u32", "u32 u32 u32", [[0x8000_0000], [6]], [3]),
    ("mul.hi.s32", "s32 s32 s32", [[-1], [6]], [-1]),
    ("mul.wide.s32", "s64 s32 s32", [[-3, 2**31 - 1], [2**30, 4]], [-3 * 2**30, 2**33 - 4]),
    ("mul.wide.u32", "u64 u32 u32", [[2**32 - 1], [2**32 - 1]], [(2**32 - 1) ** 2]),
    ("mul.wide.u16", "u32 u16 u16", [[0xFFFF], [2]], [0x1FFFE]),
    ("mad.lo.s64", "s64 s64 s64 s64", [[3], [-4], [5]], [-7]),
    ("mad.wide.u32", "u64 u32 u32 u64", [[2**31], [4], [7]], [2**33 + 7]),
    ("mad.wide.s32", "s64 s32 s32 s64", [[-(2**31)], [4], [7]], [7 - 2**33]),
    ("div.u32", "u32 u32 u32", [[7], [2]], [3]),
    ("min.s32", "s32 s32 s32", [[-1], [1]], [-1]),
    ("max.u32", "u32 u32 u32", [[2**32 - 1], [1]], [2**32 - 1]),
    # To nearest, ties to even; denormals are kept.
    ("add.rn.f32", "f32 f32 f32", [[1, 1 + 2**-23], [2**-24, 2**-24]], [1, 1 + 2**-22]),
    ("add.rn.f32", "f32 f32 f32", [[TINY, INF], [TINY, -INF]], [2 * TINY, NAN]),
    ("add.rn.f32.f16", "f32 f16 f32", [[1, -INF], [2**-24, 1]], [1, -INF]),
    ("sub.rn.f32.f16", "f32 f16 f32", [[2**-24, 65504], [0.5, 1]], [2**-24 - 0.5, 65503]),
    ("sub.rn.f64", "f64 f64 f64", [[1], [2**-54]], [1]),
    ("mul.rn.f32", "f32 f32 f32", [[1 + 2**-23, TINY], [1 + 2**-23, 0.5]], [1 + 2**-22, 0]),
    ("mul.rn.f64", "f64 f64 f64", [[2.0**-1074, 0], [-0.5, INF]], [-0.0, NAN]),
    ("div.rn.f32", "f32 f32 f32", [[1, -1, 0], [3, 0, 0]], [11184811 * 2**-25, -INF, NAN]),
    ("div.rn.f64", "f64 f64 f64", [[2.0**-1074], [2]], [0]),
    ("sqrt.rn.f32", "f32 f32", [[2, -0.0, -1]], [11863283 * 2**-23, -0.0, NAN]),
    ("sqrt.rn.f64", "f64 f64", [[4, INF]], [2, INF]),
    ("rcp.rn.f32", "f32 f32", [[3]], [11184811 * 2**-25]),
    ("neg.f32", "f32 f32", [[0, INF]], [-0.0, -INF]),
    ("max.f32", "f32 f32 f32", [[NAN, -0.0, 1], [2, 0.0, NAN]], [2, 0.0, 1]),
    ("min.f64", "f64 f64 f64", [[NAN, -0.0, 0.0], [2, 0.0, -0.0]], [2, -0.0, -0.0]),
    # Rounded once: (1 + 2^-12)^2 - (1 + 2^-11), then 1 + 2^-24 (a tie) and a little more or less.
    ("fma.rn.f32", "f32 f32 f32 f32", [[1 + 2**-12], [1 + 2**-12], [-1 - 2**-11]], [2**-24]),
    (
        "fma.rn.f32",
        "f32 f32 f32 f32",
        [[24929 * 2**-14] * 3, [673 * 2**-10] * 3, [2.0**-80, 0, -(2.0**-80)]],
        [1 + 2**-23, 1, 1],
    ),
    ("fma.rn.f32", "f32 f32 f32 f32", [[INF, 3e38, 1], [0, 3e38, -1], [1, 1, 1]], [NAN, INF, 0]),
    ("fma.rn.f64", "f64 f64 f64 f64", [[1 + 2**-27], [1 + 2**-27], [-1 - 2**-26]], [2**-54]),
    ("fma.rn.f64", "f64 f64 f64 f64", [[1e308, 2.0**-1074], [10, -0.25], [1, 0]], [INF, -0.0]),
]

BITS = [
    ("and.b32", "b32 b32 b32", [[12], [10]], [8]),
    ("or.b64", "b64 b64 b64", [[12], [2**63]], [2**63 + 12]),
    ("xor.b16", "b16 b16 b16", [[12], [10]], [6]),
    ("not.b32", "b32 b32", [[1]], [2**32 - 2]),
    ("or.pred", "pred pred pred", [[0, 1, 1], [0, 0, 1]], [False, True, True]),
    ("not.pred", "pred pred", [[0, 1]], [True, False]),
    ("shl.b32", "b32 b32 u32", [[3, 1, 1], [1, 31, 32]], [6, 2**31, 0]),
    ("shl.b64", "b64 b64 u32", [[1, 1], [63, 64]], [2**63, 0]),
    ("shr.u32", "u32 u32 u32", [[2**31, 2**31], [31, 32]], [1, 0]),
    ("shr.s32", "s32 s32 u32", [[-8, -8], [1, 40]], [-4, -1]),
    ("bfe.u32", "u32 u32 u32 u32", [[0xABCD1234] * 2, [8, 32], [8, 4]], [0x12, 0]),
    ("bfe.u32", "u32 u32 u32 u32", [[0xABCD1234] * 2, [0, 28], [0, 9]], [0, 10]),
    ("prmt.b32", "b32 b32 b32 b32", [[0x33221100], [0x77665544], [0x7632]], [0x77663322]),
    ("prmt.b32", "b32 b32 b32 b32", [[0x33221100], [0x77665584], [0x1C4C]], [0x11FF84FF]),
]

CHOICES = [
    ("setp.eq.b32", "pred b32 b32", [[1, 2], [1, 1]], [True, False]),
    ("setp.lt.s32", "pred s32 s32", [[-1, 1], [1, -1]], [True, False]),
    ("setp.lt.u32", "pred u32 u32", [[2**32 - 1, 1], [1, 2]], [False, True]),
    ("setp.hs.u32", "pred u32 u32", [[2**32 - 1, 1], [1, 2]], [True, False]),
    ("setp.gt.s64", "pred s64 s64", [[0], [-(2**63)]], [True]),
    ("setp.ne.f32", "pred f32 f32", [[NAN, 1, 0], [1, 2, -0.0]], [False, True, False]),
    ("setp.neu.f32", "pred f32 f32", [[NAN, 1], [1, 1]], [True, False]),
    ("setp.ltu.f64", "pred f64 f64", [[NAN, 2, 1], [1, 1, 2]], [True, False, True]),
    ("setp.nan.f32", "pred f32 f32", [[NAN, 1], [1, 1]], [True, False]),
    ("setp.num.f32", "pred f32 f32", [[NAN, 1], [1, 1]], [False, True]),
    ("selp.b16", "b16 b16 b16 pred", [[1, 1], [2, 2], [1, 0]], [1, 2]),
    ("selp.f64", "f64 f64 f64 pred", [[-0.0], [2], [1]], [-0.0]),
    ("mov.b64", "b64 b64", [[2**63]], [2**63]),
]

CONVERSIONS = [
    ("cvt.u32.u16", "u32 u16", [[0xFFFF]], [0xFFFF]),
    ("cvt.s64.s32", "s64 s32", [[-2]], [-2]),
    ("cvt.u64.u32", "u64 u32", [[2**32 - 2]], [2**32 - 2]),
    ("cvt.u16.u32", "u16 u32", [[0x12345]], [0x2345]),
    ("cvt.s32.s8", "s32 s32", [[0x1FF]], [-1]),
    ("cvt.rn.f32.s32", "f32 s32", [[2**24 + 1, -3]], [2**24, -3]),
    ("cvt.f64.f32", "f64 f32", [[TINY]], [TINY]),
    ("cvt.rn.f32.f64", "f32 f64", [[1 + 2**-24, 1e39, TINY / 2]], [1, INF, 0]),
    ("cvt.f32.f16", "f32 f16", [[2**-24, -INF, NAN]], [2**-24, -INF, NAN]),
    ("cvt.rn.f16.f32", "f16 f32", [[1 + 2**-11, 65519, 65520, 2**-25]], [1, 65504, INF, 0]),
    ("cvt.rzi.s32.f32", "s32 f32", [[-1.5, NAN, 3e9, -3e9]], [-1, 0, 2**31 - 1, -(2**31)]),
    ("cvt.rzi.u64.f64", "u64 f64", [[1.9, -1, 1e30]], [1, 0, 2**64 - 1]),
    ("cvt.rn.f16x2.f32", "f16x2 f32 f32", [[1], [2]], [2, 1]),  # the second is the lower half
]


@pytest.mark.parametrize(
    ("opcode", "types", "operands", "expected"),
    [*ARITHMETIC, *BITS, *CHOICES, *CONVERSIONS],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_results(opcode, types, operands, expected):
    got = compute(opcode, types.split(), operands)
    np.testing.assert_array_equal(got, np.array(expected, got.dtype))
    if got.dtype.kind == "f":
        negative = np.signbit(np.array(expected, got.dtype))
        np.testing.assert_array_equal(np.signbit(got) & ~np.isnan(got), negative & ~np.isnan(got))


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_pairs_are_computed_apart(name):
    pairs = (
        np.array([1, 2**-24, 3, TINY], np.float32),
        np.array([2**-24, 1, INF, -TINY], np.float32),
    )
    words = [pair.view(np.uint64) for pair in pairs]
    got = compute(f"{name}.rn.f32x2", ["b64"] * 3, words)
    halves = compute(f"{name}.rn.f32", ["f32"] * 3, list(pairs))
    np.testing.assert_array_equal(got.view(np.uint32), halves.view(np.uint32))


def test_a_fused_multiply_add_is_what_exact_arithmetic_rounds_to():
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((3, 4000)).astype(np.float32)
    c[:2000] = -(a * b)[:2000] * (1 + random.integers(-2, 3, 2000) * np.float32(2**-23))
    got = operation("fma.rn.f32").compute(a, b, c)
    # In float64 the fused operation is made of fractions: rounded once, and here it is exact.
    long = [np.float64(each) for each in (a, b, c)]
    exact = operation("fma.rn.f64").compute(*long)
    close = np.abs(np.float64(got) - exact) <= np.spacing(np.abs(got)) / 2
    assert close.all()


@pytest.mark.parametrize(
    "opcode",
    ["div.full.f32", "div.approx.f32", "sqrt.approx.f32", "rsqrt.approx.f32", "ex2.approx.f32"],
)
def test_approximations_are_refused(opcode):
    with pytest.raises(InexactInstructionError, match=f"{opcode}: an approximation has no defined"):
        operation(opcode)


@pytest.mark.parametrize(
    ("opcode", "message"),
    [
        ("wgmma.fence", "wgmma.fence: unknown instruction"),
        ("add.rz.f32", "unknown qualifier 'rz'"),
        ("add.rn.ftz.f32", "unknown qualifier 'ftz'"),
        ("add.rn.s32", "unknown qualifier 's32'"),
        ("add.f32.x", "unknown qualifier 'x'"),
        ("add", "unknown qualifier 'nothing'"),
        ("mul.s32", "unknown qualifier 's32'"),
        ("mul.wide.u64", "unknown qualifier 'u64'"),
        ("cvt.f32.f64", "rounding must be rn"),
        ("cvt.rn.f64.f32", "rounding must be None"),
        ("cvt.rn.s32.f32", "rounding must be rzi"),
        ("setp.lt.b32", "no comparison of b32"),
        ("setp.lo.s32", "no comparison of s32"),
        ("setp.num.s32", "no comparison of s32"),
    ],
)
def test_what_is_not_known_is_refused(opcode, message):
    with pytest.raises(UnknownInstructionError, match=message):
        operation(opcode)


def test_every_type_is_as_wide_as_it_says():
    for name, scalar in SCALARS.items():
        assert scalar.bits == 1 or scalar.raw.itemsize * 8 == scalar.bits, name
