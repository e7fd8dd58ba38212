"""Frozen parameters, of any kind: they cost no state until they are unfrozen."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import LazyLinear, Linear, Parameter, Sequential, UninitializedParameter
from torch.optim import Optimizer

from hogstream.optim import RMSprop, RMSpropAsync
from optim_testing import parameters, step_along

MakeOptimizer = Callable[..., Optimizer]


class Quantized(Parameter):
    """A parameter of a class of somebody else's, as libraries for quantization have them."""


FROZEN: dict[str, Callable[[], torch.Tensor]] = {
    "uint8": lambda: torch.zeros(3, dtype=torch.uint8),
    "int8": lambda: torch.zeros(3, dtype=torch.int8),
    "int64": lambda: torch.zeros(3, dtype=torch.int64),
    "bool": lambda: torch.zeros(3, dtype=torch.bool),
    "float8": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "complex64": lambda: torch.zeros(3, dtype=torch.complex64),
    "complex32": lambda: torch.zeros(3, dtype=torch.complex32),
    "quint8": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
    "expanded": lambda: torch.zeros(1).expand(3),
    "gaps": lambda: torch.zeros(6)[::2],
    "overlapping": lambda: torch.zeros(4).unfold(0, 2, 1),
    "coo": lambda: torch.zeros(3).to_sparse(),
    "csr": lambda: torch.zeros(3, 3).to_sparse_csr(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "conjugated": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "empty": lambda: torch.zeros(0, 3),
    "shared": lambda: torch.zeros(3).share_memory_(),
}


def frozen_parameters() -> list[Parameter]:
    params = [Parameter(make(), requires_grad=False) for make in FROZEN.values()]
    lazy: Any = UninitializedParameter(requires_grad=False)
    quantized: Any = Quantized(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    return [*params, lazy, quantized]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of what torch has only a beta of
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_frozen_parameters_of_any_kind_are_left_alone(backend, flat):
    frozen = frozen_parameters()
    ours, theirs = parameters((3, 4), (5,)), parameters((3, 4), (5,))
    optimizer = RMSprop([ours[0], *frozen, ours[1]], flat=flat, momentum=0.5, backend=backend)
    optimizer.add_param_group({"params": frozen_parameters()})
    peer = torch.optim.RMSprop(theirs, momentum=0.5)
    for _ in range(3):
        for params, each in ((ours, optimizer), (theirs, peer)):
            each.zero_grad()
            torch.cat([param.square().flatten() for param in params]).sum().backward()
            each.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert optimizer.state.keys() == set(ours)
    assert optimizer.share_memory().state.keys() == set(ours)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state.keys() == set(ours)


def test_a_frozen_parameter_whose_memory_was_freed_is_left_alone():
    (param,) = parameters((3,))
    frozen = Parameter(torch.zeros(3), requires_grad=False)
    frozen.untyped_storage().resize_(0)
    optimizer = RMSprop([frozen, param], flat=True)
    step_along(RMSprop([param]), first_seed=0)
    optimizer.step()
    assert optimizer.state.keys() == {param}
    frozen.untyped_storage().resize_(12)  # or whoever prints it reads where nothing is


def test_state_of_what_is_trained_is_all_that_is_made():
    model = Sequential(Linear(300, 300), Linear(300, 1))
    model[0].requires_grad_(False)
    gc.collect()
    optimizer = RMSpropAsync(model.parameters())
    assert sum(t.nbytes for state in optimizer.state.values() for t in state.values()) < 2000


def test_a_group_of_frozen_parameters_may_hold_any_numbers_until_one_is_trained():
    """As those of float64 may be smaller than float32 can hold."""
    frozen, param = parameters((3,), (3,))
    frozen.requires_grad_(False)
    double = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = RMSpropAsync([{"params": [frozen, double], "lr": 1e-60}, {"params": [param]}])
    double.grad, param.grad = torch.ones_like(double), torch.ones_like(param)
    optimizer.step()
    before = param.tolist()
    frozen.grad = torch.ones(3)
    with pytest.raises(ValueError, match="lr must be a number that float32"):
        optimizer.step()
    assert param.tolist() == before


def unfreeze(make: MakeOptimizer, *, gradually: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Sequential(Linear(4, 5), Linear(5, 3), Linear(3, 2)).requires_grad_(False)
    optimizer = make(model.parameters(), lr=0.01, momentum=0.5, centered=True)
    for step in range(8):
        if gradually and step in (1, 3, 5):
            model[2 - step // 2].requires_grad_(True)
        if step == 6:
            model[1].requires_grad_(not gradually)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    return [
        *model.parameters(),
        *(optimizer.state[p]["step"] for p in model.parameters() if p in optimizer.state),
    ]


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("gradually", [True, False])
def test_what_is_unfrozen_is_trained_from_then_on(gradually, flat):
    ours = unfreeze(lambda p, **n: RMSprop(p, flat=flat, **n), gradually=gradually)
    theirs = unfreeze(torch.optim.RMSprop, gradually=gradually)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_frozen_parameter_with_a_gradient_is_updated_as_by_torch():
    ours, theirs = (torch.ones(3) for _ in range(2))
    step_along(RMSprop([ours]), first_seed=0, steps=3)
    step_along(torch.optim.RMSprop([theirs]), first_seed=0, steps=3)
    torch.testing.assert_close(ours, theirs)


def test_what_is_unfrozen_when_state_is_shared_is_refused_with_the_way_out():
    model = Sequential(Linear(3, 4), Linear(4, 2)).share_memory()
    model[0].requires_grad_(False)
    optimizer = RMSpropAsync(model.parameters()).share_memory()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    model(torch.ones(4, 3)).sum().backward()
    before = [param.tolist() for param in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"param 0 in group 0 has no .*unfreeze.*before state is"
    ):
        optimizer.step()
    assert [param.tolist() for param in model.parameters()] == before
    optimizer = RMSpropAsync(model.parameters()).share_memory()
    optimizer.step()
    assert all(optimizer.state[param]["step"] == 1 for param in model.parameters())


def make_half_frozen(*, frozen: bool) -> tuple[Sequential, RMSpropAsync]:
    torch.manual_seed(0)
    model = Sequential(Linear(3, 4), Linear(4, 2))
    model[0].requires_grad_(not frozen)
    return model, RMSpropAsync(model.parameters(), momentum=0.5)


@pytest.mark.parametrize("saved_frozen", [False, True])
@pytest.mark.parametrize("loaded_frozen", [False, True])
def test_state_is_saved_and_loaded_whatever_is_frozen(saved_frozen, loaded_frozen):
    """It goes on to the bit, and what was saved of a frozen parameter is there when it thaws."""
    model, optimizer = make_half_frozen(frozen=saved_frozen)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    twin, other = make_half_frozen(frozen=loaded_frozen)
    of_model, of_optimizer = torch.load(file)
    twin.load_state_dict(of_model)
    other.load_state_dict(of_optimizer)
    for each, its in ((model, optimizer), (twin, other)):
        each.requires_grad_(True)
        its.zero_grad()
        each(torch.ones(4, 3)).square().sum().backward()
        its.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[one].keys() == other.state[two].keys()
        assert all(torch.equal(v, other.state[two][n]) for n, v in optimizer.state[one].items())


def test_state_of_what_cannot_be_updated_is_not_loaded():
    (param,) = parameters((3,))
    saved = RMSpropAsync([param]).state_dict()
    frozen = Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    optimizer = RMSpropAsync([frozen])
    with pytest.raises(TypeError, match="param 0 must be float16, bfloat16, float32 or float64"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


@pytest.mark.parametrize("kind", [RMSprop, RMSpropAsync, torch.optim.RMSprop])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_parameters_are_trained_once_they_are_there(kind):
    model = Sequential(LazyLinear(4), Linear(4, 2))
    optimizer = kind(model.parameters())
    model(torch.ones(2, 3))
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert all(optimizer.state[param]["step"] == 1 for param in model.parameters())


@pytest.mark.parametrize("kind", [RMSprop, torch.optim.RMSprop])
def test_parameters_on_meta_are_trained_once_they_have_memory(kind):
    with torch.device("meta"):
        model = Linear(3, 2)
    optimizer = kind(model.parameters())
    assert not optimizer.state
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.reset_parameters()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert all(optimizer.state[param]["step"] == 1 for param in model.parameters())


def test_a_gradient_on_meta_is_refused():
    (good,) = parameters((3,))
    param = Parameter(torch.ones(3, device="meta"))
    optimizer = RMSpropAsync([good, param])
    good.grad, param.grad = torch.ones(3), torch.ones(3, device="meta")
    before = good.tolist()
    with pytest.raises(ValueError, match="takes cpu tensors, got one on meta"):
        optimizer.step()
    assert good.tolist() == before


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    "make", [lambda: LazyLinear(4).weight, lambda: Parameter(torch.ones(3, device="meta"))]
)
def test_flat_memory_is_for_what_has_memory(make):
    (good,) = parameters((3,))
    address = good.data_ptr()
    with pytest.raises(ValueError, match="param 1 in group 0 must have memory before flat=True"):
        RMSpropAsync([good, make()], flat=True)
    assert good.data_ptr() == address


def test_flat_memory_leaves_what_a_frozen_parameter_shares():
    (param,) = parameters((4, 4))
    frozen = Parameter(param.detach()[::2], requires_grad=False)
    with pytest.raises(ValueError, match="must not overlap in memory"):
        RMSpropAsync([param, frozen], flat=True)
    frozen_alike = Parameter(frozen.detach(), requires_grad=False)
    RMSpropAsync([frozen, frozen_alike, *parameters((3,))], flat=True)
