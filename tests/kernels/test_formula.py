"""The formula that all backends run: over any numbers, and with a clamp that hides no NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hogstream.kernels.formula import rmsprop
from hogstream.kernels.hyperparameters import Hyperparameters, Switches
from update_testing import ALL_VARIANTS, BACKENDS, State, assert_same_bits, normal, worn_state


@pytest.mark.parametrize("options", ALL_VARIANTS)
def test_it_runs_over_the_numbers_of_python(options):
    h = Hyperparameters(**options)
    state, grad = worn_state(7, torch.float64, seed=0, **options), normal(7, torch.float64, seed=5)
    operands = [state.param, grad, *state[1:]]
    columns: list[list[Any]] = [[None] * 7 if each is None else each.tolist() for each in operands]
    rows = [
        rmsprop(p, g, ms, ga, buf, h.factors, *h.switches.of_formula)
        for p, g, ms, ga, buf in zip(*columns, strict=True)
    ]
    new = (
        None if before is None else torch.tensor(after, dtype=torch.float64)
        for before, after in zip(state, zip(*rows, strict=True), strict=True)
    )
    backend = BACKENDS[0].values[0]
    assert_same_bits(State.of(new), backend.update(state, grad, **options))


# With alpha = 1 state stays as it is; with lr = eps = 1 and a gradient of 1, a parameter of 0
# becomes -1 / sqrt(v + 1).
CLAMPED = [
    pytest.param(1.0, 2.0, -1.0, id="less than 0"),
    pytest.param(3.0, 0.0, -0.5, id="greater than 0"),
    pytest.param(4.0, 2.0, -1.0, id="0"),
    pytest.param(1.0, 1e30, -1.0, id="minus infinity"),
    pytest.param(torch.inf, 1.0, 0.0, id="infinity"),
    pytest.param(torch.nan, 1.0, torch.nan, id="NaN in the mean square"),
    pytest.param(1.0, torch.nan, torch.nan, id="NaN in the mean"),
    pytest.param(torch.inf, 1e30, torch.nan, id="NaN that the difference makes"),
]


@pytest.mark.parametrize(("ms", "grad_avg", "param"), CLAMPED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variance_below_0_is_0_and_one_that_is_nan_stays(backend, ms, grad_avg, param):
    zero, *state = (torch.full((33,), value) for value in (0.0, ms, grad_avg))
    numbers = {"lr": 1.0, "alpha": 1.0, "eps": 1.0, "centered": True}
    updated = backend.update(State(zero, *state), torch.ones(33), **numbers)
    assert_same_bits(updated, State(torch.full((33,), param), *state))


def test_switches_go_through_their_bits():
    for bits in range(1 << len(Switches._fields)):
        assert Switches.of_bits(bits).bits == bits
