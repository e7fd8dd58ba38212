"""The rounded update stays within a few rounding errors of the update in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.reference import reference
from update_testing import BACKENDS, COMPUTE, DTYPES, State

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    param: list[float]
    grad: list[float]
    ms: list[float]
    grad_avg: list[float]
    momentum_buffer: list[float]
    options: dict[str, Any]


# Far enough from the ends of the range that no product underflows or overflows: the bound below
# is relative. What happens at the ends is in test_bits.
def magnitudes(largest: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | st.floats(1e-4, largest)


values = st.builds(lambda sign, size: sign * size, st.sampled_from([-1, 1]), magnitudes(1e4))
options = st.fixed_dictionaries(
    {
        "lr": magnitudes(1.0),
        "alpha": magnitudes(0.9999),
        "eps": st.floats(1e-8, 1.0),
        "weight_decay": magnitudes(1.0),
        "momentum": magnitudes(1.5),
        "centered": st.booleans(),
        "lr_in_momentum": st.booleans(),
        "eps_inside_sqrt": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "maximize": st.booleans(),
    }
)
cases = st.integers(1, 20).flatmap(
    lambda size: st.builds(
        Case,
        param=st.lists(values, min_size=size, max_size=size),
        grad=st.lists(values, min_size=size, max_size=size),
        ms=st.lists(magnitudes(1e8), min_size=size, max_size=size),
        grad_avg=st.lists(values, min_size=size, max_size=size),
        momentum_buffer=st.lists(values, min_size=size, max_size=size),
        options=options,
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)  # of up to 20 elements each
@given(case=cases)
def test_is_within_rounding_of_the_reference(backend, dtype, case):
    param, grad = (torch.tensor(each, dtype=dtype) for each in (case.param, case.grad))
    state = (case.ms, case.grad_avg, case.momentum_buffer)
    compute = COMPUTE[dtype]
    before = State(param, *(torch.tensor(each, dtype=compute) for each in state))
    before = before.needed(case.options)
    updated = backend.update(before, grad, **case.options)

    h = Hyperparameters(**case.options)
    p, g = (tensor.double().numpy() for tensor in (param, grad))
    arrays: list[Any] = [each if each is None else each.double().numpy() for each in before[1:]]
    ms, ga, buf = arrays
    exact = reference(p, g, ms, h, ga, buf)
    bounds = errors(p, g, ga, buf, exact, h, torch.finfo(compute).eps / 2)
    # Then one rounding to the parameter's dtype, which a denormal or zero feels as an absolute one.
    stored = torch.finfo(dtype)
    bounds[0] += np.abs(exact[0]) * stored.eps / 2 + stored.smallest_normal * stored.eps
    for got, wanted, bound in zip(updated, exact, bounds, strict=True):
        if got is not None and wanted is not None:
            held = np.abs(wanted) + 2 * bound < torch.finfo(got.dtype).max
            differ = np.abs(got.double().numpy() - wanted)
            assert np.all((differ <= 2 * bound)[held])


def errors(
    p: Array,
    g: Array,
    ga: Array | None,
    buf: Array | None,
    exact: tuple[Array, Array, Array | None, Array | None],
    h: Hyperparameters,
    u: float,
) -> list[Array]:
    """How far each of the results may be from the exact ones, but for what is of order u squared.

    Twice that leaves room for such terms, and for the reference's own errors in float64.

    Args:
        p: The parameter before the update.
        g: Its gradient.
        ga: Its mean, if the update is centered, before it.
        buf: Its momentum buffer, if there is momentum, before it.
        exact: All of the state after it.
        h: The numbers and switches.
        u: Bounds the relative error of one operation. Factors are rounded too.
    """
    _, ms, new_ga, new_buf = exact
    # A coupled gradient may cancel, so its error is 3u of the sum of its terms, not of itself; it
    # is squared into ms, where 4 more roundings are made.
    terms = np.abs(g) + (np.abs(h.weight_decay * p) if h.switches.coupled else 0.0)
    of_ms = of_v = u * (5 * ms + 6 * (1 - h.alpha) * terms**2)
    v, of_ga = ms, np.zeros_like(p)
    if ga is not None and new_ga is not None:
        of_ga = 6 * u * (h.alpha * np.abs(ga) + (1 - h.alpha) * terms)
        v = np.maximum(ms - new_ga**2, 0)  # which brings no two numbers further apart
        of_v = of_ms + 2 * np.abs(new_ga) * of_ga + of_ga**2 + u * (ms + 2 * new_ga**2)
    if h.eps_inside_sqrt:
        d = np.sqrt(v + h.eps)
        of_d = of_root(v + h.eps, of_v + u * (v + 2 * h.eps)) + u * d
        least = np.sqrt(h.eps) / 2
    else:
        d = np.sqrt(v) + h.eps
        of_d = of_root(v, of_v) + u * (2 * d + h.eps)
        least = h.eps / 2
    low = np.maximum(d - of_d, least)
    step, of_step = terms / low, terms / low * (6 * u + of_d / d)
    of_buf = np.zeros_like(p)
    if buf is not None and new_buf is not None:
        scale = h.lr if h.lr_in_momentum else 1.0
        of_buf = scale * (of_step + u * step) + 3 * u * np.abs(h.momentum * buf)
    if buf is None or new_buf is None:
        of_change = h.lr * (of_step + 3 * u * step)
    elif h.lr_in_momentum:
        of_change = of_buf + u * np.abs(new_buf)
    else:
        of_change = h.lr * (of_buf + 3 * u * np.abs(new_buf))
    of_p = 5 * u * np.abs(p) + of_change
    return [of_p, of_ms, of_ga, of_buf]


def of_root(number: Array, error: Array) -> Array:
    """How far roots may be apart of numbers that are so far apart."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bound: Array = np.fmin(np.sqrt(error), error / np.sqrt(number))
    return bound
