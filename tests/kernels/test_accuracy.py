"""The rounded update stays within a few rounding errors of the update in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.reference import reference
from update_testing import BACKENDS, DTYPES, State


@dataclass(frozen=True)
class Case:
    param: list[float]
    grad: list[float]
    ms: list[float]
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
        options=options,
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases)
def test_is_within_rounding_of_the_reference(backend, dtype, case):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    param, grad = (torch.tensor(values, dtype=dtype) for values in (case.param, case.grad))
    ms = torch.tensor(case.ms, dtype=compute)
    updated = backend.update(State(param, ms), grad, **case.options)

    h = Hyperparameters(**case.options)
    p, g, m = (tensor.double().numpy() for tensor in (param, grad, ms))
    exact_param, exact_ms = reference(p, g, m, h)

    # u bounds the relative error of one operation. A coupled gradient may cancel, so its error is
    # 3u of the sum of its terms, not of itself; it is squared into ms, where 4 more roundings are
    # made, and once more into the step, with at most 8 more. Factors are rounded too. Twice that
    # bound leaves room for the reference's own errors in float64 and for terms of order u squared.
    u = torch.finfo(compute).eps / 2
    terms = np.abs(g) + (np.abs(h.weight_decay * p) if h.coupled else 0.0)
    denominator = np.sqrt(exact_ms + h.eps) if h.eps_inside_sqrt else np.sqrt(exact_ms) + h.eps
    ms_error = u * (5 * exact_ms + 6 * (1 - h.alpha) * terms**2)
    param_error = u * (4 * np.abs(p) + 16 * h.lr * terms / denominator)
    # Then one rounding to the parameter's dtype, which a denormal or zero feels as an absolute one.
    stored = torch.finfo(dtype)
    param_error += np.abs(exact_param) * stored.eps / 2 + stored.smallest_normal * stored.eps

    assert np.all(np.abs(updated.ms.double().numpy() - exact_ms) <= 2 * ms_error)
    assert np.all(np.abs(updated.param.double().numpy() - exact_param) <= 2 * param_error)
