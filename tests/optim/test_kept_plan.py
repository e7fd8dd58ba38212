"""From step to step the optimizer keeps its launch table: whatever moved since must be noticed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from hogstream.optim import RMSpropAsync
from optim_testing import parameters, step_with
from update_testing import State, assert_same_bits, formula, normal

SHAPES = [(4, 4), (3,), (2, 3, 4, 4), (5,)]
WHICH = 1  # of the parameters is tampered with; 0 is square, 2 has four axes


def clear_gradients(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    optimizer.zero_grad()


def keep_gradients(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    optimizer.zero_grad(set_to_none=False)


def move_gradients(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    for param in params:
        param.grad = torch.empty(param.numel() + 1)[1:].view(param.shape)


def move_data_of_gradient(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    grad = params[WHICH].grad
    assert grad is not None
    grad.data = torch.empty(grad.shape)


def swap_gradients(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    grad = params[0].grad
    assert grad is not None
    params[0].grad = grad.T  # the same address, in another order


def move_parameter(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    params[WHICH].data = params[WHICH].data.clone()


def drop_gradient(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    params[WHICH].grad = None
    params[WHICH].requires_grad_(False)


def move_state(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    state = optimizer.state[params[WHICH]]
    state["square_avg"] = state["square_avg"].clone()


def share_state(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    for state in optimizer.state.values():
        state["square_avg"].share_memory_()
        state["step"].share_memory_()


def move_step(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    counts = torch.full((len(params),), 2.0)  # at the same offset of other memory
    optimizer.state[params[WHICH]]["step"] = counts[WHICH]


def negate_gradient(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    grad = params[WHICH].grad
    assert grad is not None
    params[WHICH].grad = torch._neg_view(grad)  # the same address, read with the other sign


def replace_state(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    state = optimizer.state[params[WHICH]]
    optimizer.state[params[WHICH]] = {name: value.clone() for name, value in state.items()}


def reload_state(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def add_group(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    params.append(Parameter(torch.ones(7)))
    optimizer.add_param_group({"params": [params[-1]]})


def change_lr(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = 0.125


def move_to_another_group(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


TAMPERING: list[Callable[[RMSpropAsync, list[Parameter]], None]] = [
    clear_gradients,
    keep_gradients,
    move_gradients,
    move_data_of_gradient,
    swap_gradients,
    move_parameter,
    drop_gradient,
    move_state,
    share_state,
    move_step,
    negate_gradient,
    replace_state,
    reload_state,
    add_group,
    change_lr,
    move_to_another_group,
]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("tamper", TAMPERING)
def test_a_step_sees_what_has_changed_since_the_last(tamper, backend):
    params = parameters(*SHAPES)
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.25}]
    optimizer = RMSpropAsync(groups, backend=backend)
    for step in range(4):
        if step == 2:
            tamper(optimizer, params)
        step_and_compare(optimizer, seed=100 * step)


def step_and_compare(optimizer: RMSpropAsync, seed: int) -> None:
    """Steps along new gradients, written into those that there are, and checks every bit."""
    expected: dict[Parameter, tuple[State, float]] = {}
    for group in optimizer.param_groups:
        for place, param in enumerate(group["params"]):
            before = optimizer.state[param]
            if not param.requires_grad:
                unchanged = State(param.detach().clone(), before["square_avg"].clone())
                expected[param] = unchanged, before["step"].item()
                continue
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(normal(param.numel(), param.dtype, seed + place).view(param.shape))
            state = State(param.detach().clone(), before["square_avg"].clone())
            updated = formula(state, param.grad.resolve_neg(), lr=group["lr"])
            expected[param] = updated, before["step"].item() + 1
    optimizer.step()
    for param, (state, step) in expected.items():
        now = optimizer.state[param]
        assert_same_bits(State(param.detach(), now["square_avg"]), state)
        assert now["step"].item() == step


def test_other_parameters_may_have_gradients_at_each_step():
    params = parameters((3,), (4,), (5,))
    optimizer = RMSpropAsync(params, lr=0.5, alpha=0.0, eps=0.0)
    expected = [param.detach().clone() for param in params]
    counts = [0, 0, 0]
    for reached in ((0, 1, 2), (0, 2), (1,), (), (1, 2), (0, 1, 2)):
        optimizer.zero_grad()
        for place in reached:
            params[place].grad = torch.ones_like(params[place])
            expected[place] -= 0.5
            counts[place] += 1
        optimizer.step()
        assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))
        assert [optimizer.state[param]["step"].item() for param in params] == counts


def test_other_parameters_without_elements_may_have_gradients_at_each_step():
    """They all lie at one address."""
    params = parameters((3,), (0,), (0,))
    optimizer = RMSpropAsync(params)
    for reached in (params[:2], params[::2], params[:2]):
        step_with(optimizer, reached)
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 2, 1]


def test_no_gradient_is_kept_alive():
    params = parameters((3,), (2, 3))
    optimizer = RMSpropAsync(params)
    gradients = []
    for param in params:
        param.grad = torch.ones_like(param)
        gradients.append(weakref.ref(param.grad))
    optimizer.step()
    optimizer.zero_grad()
    assert [gradient() for gradient in gradients] == [None, None]


def test_a_parameter_that_shrinks_in_place_is_refused():
    params = parameters((4, 3), (4, 3))
    optimizer = RMSpropAsync(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = params[0].detach().clone()
    params[1].grad = None
    params[1].data = params[1].data[:2]  # at the same address
    params[1].grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match="square_avg of param 1 in group 0 must be dense and have"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_a_gradient_that_moves_onto_a_parameter_is_refused():
    params = parameters((8,), (8,), (8,))
    optimizer = RMSpropAsync(params)
    for param in params:
        param.grad = torch.ones(8)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    params[2].grad = params[0].detach()
    message = "grad of param 2 in group 0 and param 0 in group 0 must not overlap in memory"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def shorten_data_of_gradient(optimizer: RMSpropAsync, param: Parameter) -> None:
    assert param.grad is not None
    param.grad.data = torch.ones(2, 4)


def convert_data_of_gradient(optimizer: RMSpropAsync, param: Parameter) -> None:
    assert param.grad is not None
    param.grad.data = torch.ones(4, 4, dtype=torch.int32)


REFUSED: list[tuple[Callable[[RMSpropAsync, Parameter], None], type[Exception], str]] = [
    (shorten_data_of_gradient, ValueError, "grad of param 1 in group 0 must have the shape of"),
    (convert_data_of_gradient, TypeError, "grad of param 1 in group 0 must be float16, bfloat16"),
]


@pytest.mark.parametrize(("tamper", "error", "message"), REFUSED)
def test_what_no_longer_fits_is_refused_as_at_the_first_step(tamper, error, message):
    params = parameters((4, 4), (4, 4))
    optimizer = RMSpropAsync(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    tamper(optimizer, params[1])
    before = [param.detach().clone() for param in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_parameter_of_another_dtype_at_the_same_address_is_noticed():
    param = Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = RMSpropAsync([param], lr=0.5, alpha=0.0, eps=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    param.data = param.data.view(torch.bfloat16).fill_(1)
    param.grad.data = param.grad.data.view(torch.bfloat16).fill_(1)
    optimizer.step()
    assert param.tolist() == [0.5] * 4


def free_storage(param: Parameter) -> None:
    assert param.grad is not None
    param.grad.untyped_storage().resize_(0)


def leave_zeros_unwritten(param: Parameter) -> None:
    param.grad = torch._efficientzerotensor(param.shape)


@pytest.mark.parametrize("steps", [0, 1], ids=["first", "kept"])
@pytest.mark.parametrize("lose", [free_storage, leave_zeros_unwritten])
def test_a_gradient_without_memory_is_refused(lose, steps):
    params = parameters((3,), (5,))
    optimizer = RMSpropAsync(params)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    lose(params[1])
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="grad of param 1 in group 0 must have memory of its own"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


class Wrapper(torch.Tensor):
    """A tensor with no memory of its own, as DTensor is."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return Wrapper._make_wrapper_subclass(cls, (3,))


def test_a_parameter_without_memory_is_refused():
    wrapper = Wrapper._make_wrapper_subclass(Wrapper, (3,))
    with pytest.raises(ValueError, match="param 0 must have memory of its own, got a Wrapper"):
        RMSpropAsync([Parameter(wrapper)])
