from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hogstream.scheduler import SharedParameters


def make_module() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def test_module_computes_from_the_shared_storage() -> None:
    module = make_module()
    before = module(torch.ones(3))
    shared = SharedParameters.from_module(module)
    assert torch.equal(module(torch.ones(3)), before)
    shared.flat.zero_()
    assert module(torch.ones(3)).eq(0).all()


def test_replica_sees_the_same_parameters_and_keeps_its_own_gradients() -> None:
    module = make_module()
    shared = SharedParameters.from_module(module)
    replica = copy.deepcopy(module)
    shared.attach(replica)
    shared.flat.fill_(0.5)
    for mine, theirs in zip(replica.parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() == theirs.data_ptr()
    replica(torch.ones(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in replica.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_views_name_the_flat_elements_in_order() -> None:
    shared = SharedParameters({"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(4)})
    views = shared.views_of(torch.arange(11.0))
    assert views["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert views["b"].item() == 6
    assert views["c"].tolist() == [7, 8, 9, 10]
    assert shared.elements == 11


def test_parameters_given_are_copied() -> None:
    given = torch.ones(3)
    SharedParameters({"p": given}).flat.zero_()
    assert given.tolist() == [1, 1, 1]


def test_tied_parameters_are_shared_once() -> None:
    module = make_module()
    module.append(module[0])
    shared = SharedParameters.from_module(module)
    assert shared.elements == 3 * 4 + 4 + 4 * 2 + 2
    shared.flat.fill_(2.0)
    assert all(parameter.eq(2).all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_mean_square_starts_at_zero_in_the_compute_type(
    dtype: torch.dtype, compute: torch.dtype
) -> None:
    shared = SharedParameters({"p": torch.ones(5, dtype=dtype)})
    assert shared.ms.dtype == compute
    assert shared.ms.tolist() == [0] * 5
    assert shared.version == 0


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({}, ValueError, "at least one tensor, got none"),
        ([torch.zeros(2)], TypeError, "parameters must map names to tensors, got list"),
        ({"a": [1.0]}, TypeError, "a must be a torch tensor, got list"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, TypeError, "a must be .*float32.* got int64"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)},
            TypeError,
            "b must be torch.float32 as a, got torch.float64",
        ),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")},
            ValueError,
            "b must be on cpu as a, got meta",
        ),
    ],
)
def test_parameters_that_cannot_be_shared_are_refused(
    parameters: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SharedParameters(parameters)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.nn.Sequential(torch.nn.Linear(3, 4)), "names"),
        (
            torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)),
            r"1.weight must be .*2, 4.*got .*3, 4",
        ),
        (make_module().double(), "0.weight must be .*float32.*got .*float64"),
    ],
)
def test_attaching_another_module_is_refused_and_leaves_it_alone(other: Any, message: str) -> None:
    shared = SharedParameters.from_module(make_module())
    before = [parameter.data_ptr() for parameter in other.parameters()]
    with pytest.raises(ValueError, match=message):
        shared.attach(other)
    assert [parameter.data_ptr() for parameter in other.parameters()] == before
