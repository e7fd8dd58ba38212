"""What Triton's kernels of dense updates and of rows have in common."""

from __future__ import annotations

import triton
import triton.language as tl

from hogstream.kernels import rounding
from hogstream.kernels.formula import formula_over

#: Arguments of all kernels of the update, in the order of ``Factors`` but for weight decay.
FACTORS = ("lr", "alpha", "beta", "eps", "weight_decay", "decoupled_decay", "sign", "momentum")


@triton.jit
def _sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)  # which lacks float64


@triton.jit
def _divide(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)  # which lacks float64


@triton.jit
def _clamp(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


#: The formula over tensors of Triton's.
formula = formula_over(
    compiled=triton.jit, sqrt=_sqrt, divide=_divide, clamp=_clamp, where=_where, tl=tl
)
_mixed = triton.jit(rounding.over(rounding.mixed, tl=tl))
_random = triton.jit(rounding.over(rounding.random, mixed=_mixed, tl=tl))
_bfloat16 = triton.jit(rounding.over(rounding.bfloat16, where=_where, tl=tl))
_float16 = triton.jit(rounding.over(rounding.float16, where=_where, tl=tl))


@triton.jit
def as_factors(
    lr,  # these as kernels have them
    alpha,
    beta,
    eps,
    weight_decay,
    decoupled_decay,
    sign,
    momentum,
    grad_factor,
    LR_ON_DEVICE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The factors of the formula, in float64."""
    if LR_ON_DEVICE:
        lr = tl.load(lr.to(tl.int64).to(tl.pointer_type(tl.float64)))
    else:
        lr = _as_float64(lr)
    shrink = 1.0 - lr * _as_float64(decoupled_decay)
    of_grad = _as_float64(sign)
    if SCALED:
        of_grad *= tl.load(grad_factor.to(tl.int64).to(tl.pointer_type(tl.float64)))
    return (
        lr,
        _as_float64(alpha),
        _as_float64(beta),
        _as_float64(eps),
        _as_float64(weight_decay),
        shrink,
        of_grad,
        _as_float64(momentum),
    )


@triton.jit
def _as_float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def round_factors(
    factors,  # in float64
    compute: tl.constexpr,  # float32 or float64
):
    """The factors of the formula in the compute type, each rounded once."""
    lr, alpha, beta, eps, weight_decay, shrink, sign, momentum = factors
    return (
        lr.to(compute),
        alpha.to(compute),
        beta.to(compute),
        eps.to(compute),
        weight_decay.to(compute),
        shrink.to(compute),
        sign.to(compute),
        momentum.to(compute),
    )


@triton.jit
def is_nonzero(
    verdict,  # address of 32 bits
):
    """Whether a verdict is that nothing may be updated."""
    return tl.load(verdict.to(tl.int64).to(tl.pointer_type(tl.int32))) != 0


# The interpreter's own conversions from and to bfloat16 are wrong, so these are made by hand.
@triton.jit
def widened(
    x,  # elements as they are stored
    compute: tl.constexpr,  # float32 or float64
):
    """Elements in the compute type; exact."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(compute)


@triton.jit
def _narrowed(
    x,  # elements in the compute type
    storage: tl.constexpr,  # dtype: int16 for bfloat16
):
    """Elements as they are stored, rounded to nearest even."""
    if storage == tl.int16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where(x != x, 0x7FC0, rounded)
    return x.to(storage)


@triton.jit
def _by_chance(
    x,  # float32
    places,  # of these elements: int64
    key,  # of the step: an int64
    storage: tl.constexpr,  # int16 for bfloat16, or float16
):
    """Elements as they are stored, rounded stochastically."""
    low, high = places.to(tl.uint32), (places >> 32).to(tl.uint32)
    random = _random(low, high, key.to(tl.uint32), (key >> 32).to(tl.uint32))
    bits = x.to(tl.uint32, bitcast=True)
    bits = _bfloat16(bits, random) if storage == tl.int16 else _float16(bits, random)
    return bits.to(tl.uint16).to(storage, bitcast=True)


@triton.jit
def as_stored(
    p,  # elements of the parameter in the compute type
    comp_ptr,  # where what rounding leaves of each is kept, if COMPENSATED
    mask,  # of those that there are, or None
    places,  # of each, if STOCHASTIC: int64
    key,  # of the step, if STOCHASTIC: an int64
    storage: tl.constexpr,  # dtype: int16 for bfloat16
    STOCHASTIC: tl.constexpr,  # these as in ``Switches``
    COMPENSATED: tl.constexpr,
):
    """Elements as they are stored; what rounding leaves of them is stored, if it is kept."""
    stored = _by_chance(p, places, key, storage) if STOCHASTIC else _narrowed(p, storage)
    if COMPENSATED:
        left = p - widened(stored, p.dtype)
        left = tl.where(left - left == 0, left, 0.0)  # of a parameter that is not finite
        tl.store(comp_ptr, _narrowed(left, storage), mask)
    return stored
