"""``flat=True``: parameters, gradients and state in one piece of memory, with the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from hogstream.optim import RMSpropAsync
from optim_testing import parameters
from update_testing import DTYPES, State, assert_same_bits, normal

SHAPES = [(3, 5), (1,), (), (0, 3), (2, 3, 4, 4), (17,)]


def pair(dtype: torch.dtype, **options: Any) -> tuple[list[RMSpropAsync], list[list[Parameter]]]:
    """Two optimizers of equal parameters, the first of them flat."""
    both = [parameters(*SHAPES, dtype=dtype) for _ in range(2)]
    for params in both:
        params[4].data = params[4].data.to(memory_format=torch.channels_last)
    return [
        RMSpropAsync(p, flat=f, **options) for p, f in zip(both, (True, False), strict=True)
    ], both


def add_to_gradients(params: list[Parameter], seed: int) -> None:
    """What backward does: adds to a gradient where there is one, and else makes it."""
    for place, param in enumerate(params):
        values = normal(param.numel(), param.dtype, seed + place).view(param.shape)
        param.grad = values if param.grad is None else param.grad.add_(values)


def assert_equal_results(optimizers: list[RMSpropAsync], both: list[list[Parameter]]) -> None:
    for one, other in zip(*both, strict=True):
        states = [o.state[p] for o, p in zip(optimizers, (one, other), strict=True)]
        of_one, of_other = (
            State(p.detach(), s["square_avg"]) for p, s in zip((one, other), states, strict=True)
        )
        assert_same_bits(of_one, of_other)
        assert states[0]["step"] == states[1]["step"]
        assert one.stride() == other.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_trains_to_the_bits_of_a_list_of_tensors(dtype):
    optimizers, both = pair(dtype, weight_decay=0.1)
    for step in range(3):
        for optimizer, params in zip(optimizers, both, strict=True):
            optimizer.zero_grad()
            add_to_gradients(params, seed=100 * step)
            optimizer.step()
    assert_equal_results(optimizers, both)


def test_memory_is_one_piece_each_and_stays_so():
    params = parameters(*SHAPES)
    optimizer = RMSpropAsync(params, flat=True)
    bytes_each = sum(-(-param.nbytes // 64) * 64 for param in params)

    def spans() -> list[tuple[int, int]]:
        mss = [optimizer.state[param]["square_avg"] for param in params]
        return [
            (
                min(tensor.data_ptr() for tensor in tensors if tensor.numel()),
                max(tensor.data_ptr() + tensor.nbytes for tensor in tensors if tensor.numel()),
            )
            for tensors in (params, [p.grad for p in params if p.grad is not None], mss)
        ]

    before = spans()
    assert all(end - start <= bytes_each for start, end in before)
    for _ in range(2):
        optimizer.zero_grad()
        sum((param.square().sum() for param in params), torch.zeros(())).backward()
        optimizer.step()
    assert spans() == before
    assert all(param.data_ptr() % 64 == 0 for param in params if param.numel())


def test_a_step_is_one_launch_without_a_table():
    params = parameters(*SHAPES)
    optimizer = RMSpropAsync(params, flat=True)
    optimizer.step()
    assert optimizer._plan is not None
    assert [launch.table.updates for launch in optimizer._plan.launches] == [1]


def test_each_group_and_dtype_is_flat_by_itself():
    params = [Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float16) * 2]
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.25}]
    optimizer = RMSpropAsync(groups, flat=True, alpha=0.0, eps=0.0)
    assert len({param.untyped_storage().data_ptr() for param in params}) == 4
    for param in params:
        assert param.grad is not None
        param.grad.fill_(2.0)
    optimizer.step()
    assert [param[0].item() for param in params] == [0.5, 0.5, 0.75, 0.75]


def test_values_and_gradients_from_before_are_kept():
    param = Parameter(torch.tensor([1.0, 2.0]))
    param.grad = torch.tensor([4.0, 4.0])
    optimizer = RMSpropAsync([param], flat=True, lr=0.5, alpha=0.0, eps=0.0)
    assert param.tolist() == [1.0, 2.0]
    optimizer.step()
    assert param.tolist() == [0.5, 1.5]


def replace_gradients(params: list[Parameter]) -> None:
    for param in params:
        param.grad = None


def replace_one_gradient(params: list[Parameter]) -> None:
    params[0].grad = torch.zeros(params[0].shape)


def move_one_parameter(params: list[Parameter]) -> None:
    params[0].data = params[0].data.clone()


@pytest.mark.parametrize("leave", [replace_gradients, replace_one_gradient, move_one_parameter])
def test_what_leaves_the_flat_memory_is_updated_all_the_same(leave):
    optimizers, both = pair(torch.float32)
    for step in range(4):
        for optimizer, params in zip(optimizers, both, strict=True):
            optimizer.zero_grad()
            if step == 1:
                leave(params)
            add_to_gradients(params, seed=100 * step)
            optimizer.step()
    assert_equal_results(optimizers, both)


def test_zero_grad_brings_gradients_back():
    params = parameters(*SHAPES)
    optimizer = RMSpropAsync(params, flat=True)
    at_first = [param.grad for param in params]
    optimizer.zero_grad(set_to_none=True)
    assert [param.grad for param in params] == [None] * len(SHAPES)
    add_to_gradients(params, seed=0)
    optimizer.zero_grad()
    assert all(param.grad is grad for param, grad in zip(params, at_first, strict=True))
    assert all(not param.grad.any() for param in params if param.grad is not None)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.to(memory_format=torch.channels_last),
        lambda module: module.half(),
        lambda module: setattr(module.weight.grad, "data", torch.ones(4, 3, 2, 2)),
    ],
    ids=["layout", "dtype", "grad"],
)
def test_zero_grad_clears_gradients_that_were_moved_in_place(change):
    module = torch.nn.Conv2d(3, 4, 2)
    optimizer = RMSpropAsync(module.parameters(), flat=True)
    optimizer.zero_grad()
    module(torch.ones(1, 3, 2, 2)).sum().backward()
    change(module)
    optimizer.zero_grad()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


def test_a_step_is_one_launch_again_when_gradients_are_back():
    params = parameters(*SHAPES)
    optimizer = RMSpropAsync(params, flat=True)
    replace_gradients(params)
    add_to_gradients(params, seed=0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer._plan is not None
    assert [launch.table.updates for launch in optimizer._plan.launches] == [1]


def test_a_parameter_without_a_gradient_is_left_alone():
    optimizers, both = pair(torch.float32)
    for optimizer, params in zip(optimizers, both, strict=True):
        add_to_gradients(params, seed=0)
        params[0].grad = None
        optimizer.step()
    assert_equal_results(optimizers, both)
    assert optimizers[0].state[both[0][0]]["step"] == 0


def test_zero_grad_of_others_is_torchs():
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param])
    param.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert param.grad.tolist() == [0.0] * 3
    optimizer.zero_grad()
    assert param.grad is None


def test_a_state_dict_goes_between_flat_and_not():
    optimizers, both = pair(torch.float32)
    for optimizer, params in zip(optimizers, both, strict=True):
        add_to_gradients(params, seed=0)
        optimizer.step()
    flat, other = optimizers
    saved = copy.deepcopy(other.state_dict())
    optimizers_again, both_again = pair(torch.float32)
    optimizers_again[0].load_state_dict(saved)
    for param, old in zip(both_again[0], both[1], strict=True):
        ms = optimizers_again[0].state[param]["square_avg"]
        assert torch.equal(ms, other.state[old]["square_avg"])
        assert ms.numel() == 0 or ms.untyped_storage().nbytes() > ms.nbytes  # it is still flat
    assert flat.state_dict()["state"].keys() == saved["state"].keys()


def test_a_copy_is_not_flat_and_goes_on():
    optimizers, both = pair(torch.float32)
    for optimizer, params in zip(optimizers, both, strict=True):
        add_to_gradients(params, seed=0)
        optimizer.step()
    flat, params = optimizers[0], both[0]
    twin, twins = copy.deepcopy((flat, params))
    for optimizer, each in ((flat, params), (twin, twins)):
        optimizer.zero_grad()
        add_to_gradients(each, seed=50)
        optimizer.step()
    assert_equal_results([flat, twin], [params, twins])
    assert not twin.flat


def test_refuses_a_switch_that_is_no_bool():
    for name in ("flat", "capturable"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
            RMSpropAsync([Parameter(torch.ones(1))], **{name: 1})  # type: ignore[arg-type]


def test_frozen_parameters_are_left_alone():
    frozen, trained = Parameter(torch.ones(3), requires_grad=False), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([frozen, trained], flat=True, lr=0.5, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        trained.sum().backward()
        optimizer.step()
    assert frozen.tolist() == [1.0] * 3
    assert frozen.grad is None
    assert torch.all(trained < 1)


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.5}, {"weight_decay": 0.5, "decoupled_weight_decay": True}, {"eps": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("zeroed_first", [False, True], ids=["made", "zeroed"])
def test_a_parameter_that_is_frozen_later_is_left_alone(zeroed_first, options):
    later, trained = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([later, trained], flat=True, **options)
    if zeroed_first:
        optimizer.zero_grad()
    later.requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad()
        trained.sum().backward()
        optimizer.step()
    assert later.tolist() == [1.0] * 3
    assert later.grad is None
    assert torch.all(trained < 1)
    later.requires_grad_(True)
    optimizer.zero_grad()
    (later + trained).sum().backward()
    optimizer.step()
    assert torch.all(later < 1)
    assert optimizer.state[later]["step"] == 1
    assert optimizer._plan is not None
    assert [launch.table.updates for launch in optimizer._plan.launches] == [1]


@pytest.mark.parametrize("options", [{"weight_decay": 0.5}, {"eps": 0.0}], ids=str)
@pytest.mark.parametrize("after", [0, 1, 2], ids="after {} steps".format)
@pytest.mark.parametrize("clip", [False, True], ids=["whole", "clipped"])
def test_a_parameter_is_left_alone_from_when_it_is_frozen(after, clip, options):
    """In a loop that clears gradients at its end, torch's optimizer has none of it either."""
    moved = []
    for make in (
        lambda params: RMSpropAsync(params, flat=True, eps_inside_sqrt=False, **options),
        lambda params: torch.optim.RMSprop(params, foreach=False, **options),
    ):
        later, trained = Parameter(torch.ones(3)), Parameter(torch.ones(3))
        optimizer = make([later, trained])
        for step in range(4):
            later.requires_grad_(step < after)
            (later * trained).sum().backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([later, trained], 10.0)
            optimizer.step()
            optimizer.zero_grad()
        moved.append((later.detach().clone(), int(optimizer.state[later].get("step", 0))))
    (ours, our_steps), (theirs, their_steps) = moved
    assert our_steps == their_steps == after
    assert torch.equal(ours == 1, theirs == 1)
    assert torch.isfinite(ours).all()


def test_a_gradient_of_a_frozen_parameter_is_taken_until_it_is_zero():
    later, trained = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([later, trained], flat=True, lr=0.5, alpha=0.0, eps=0.0)
    (later + trained).sum().backward()
    for steps in (1, 2, 3, 4):
        optimizer.step()  # from one on by a plan that is kept
        later.requires_grad_(steps < 2)
        assert later.tolist() == [1 - 0.5 * steps] * 3
    assert later.grad is not None
    later.grad.zero_()
    optimizer.step()
    assert later.grad is None
    assert later.tolist() == [-1.0] * 3
    assert trained.tolist() == [-1.5] * 3


def test_zeros_of_a_frozen_parameter_are_taken_if_no_backward_came():
    """They are what somebody has set then, as with any other optimizer."""
    later, trained = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([later, trained], flat=True)
    optimizer.zero_grad()
    later.requires_grad_(False)
    for steps in (1, 2, 3):
        optimizer.step()
        assert optimizer.state[later]["step"] == steps
    (2 * trained).sum().backward()
    optimizer.step()
    assert optimizer.state[later]["step"] == 3
    assert later.grad is None


def test_zero_grad_leaves_what_is_no_longer_in_a_group():
    kept, gone = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([kept, gone], flat=True)
    optimizer.param_groups[0]["params"] = [kept]
    gone.grad = own = torch.ones(3)
    optimizer.zero_grad()
    assert gone.grad is own
    assert own.tolist() == [1.0] * 3


def test_zero_grad_clears_what_is_not_flat_too():
    frozen, trained = Parameter(torch.ones(3), requires_grad=False), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([frozen, trained], flat=True)
    frozen.requires_grad_(True)
    (frozen + trained).sum().backward()
    optimizer.zero_grad()
    assert frozen.grad is None
    assert trained.grad is not None
    assert trained.grad.tolist() == [0.0] * 3


def test_a_group_that_is_refused_leaves_all_parameters_where_they_were():
    param = Parameter(torch.ones(3))
    address = param.data_ptr()
    groups = [{"params": [param]}, {"params": [Parameter(torch.ones(2))], "lr": -1.0}]
    with pytest.raises(ValueError, match="lr must be"):
        RMSpropAsync(groups, flat=True)
    assert param.data_ptr() == address
    assert param.grad is None


def test_parameters_that_other_processes_know_are_refused_and_stay():
    model = torch.nn.Linear(3, 2).share_memory()
    address = model.weight.data_ptr()
    message = "param 0 in group 0 must not be shared with other processes before flat=True moves it"
    with pytest.raises(ValueError, match=message):
        RMSpropAsync(model.parameters(), flat=True)
    assert model.weight.data_ptr() == address
    assert model.weight.is_shared()


def test_parameters_that_share_memory_are_refused_and_stay():
    storage = torch.ones(10)
    params = [Parameter(storage[:6]), Parameter(storage[4:])]
    message = "param 0 in group 0 and param 1 in group 0 must not overlap in memory"
    with pytest.raises(ValueError, match=message):
        RMSpropAsync(params, flat=True)
    assert params[0].data_ptr() == storage.data_ptr()


def test_an_added_group_is_flat_too():
    old, new, newer = parameters((3,), (4, 2), (5,))
    optimizer = RMSpropAsync([old], flat=True, lr=0.25, alpha=0.0, eps=0.0)
    optimizer.add_param_group({"params": [new, newer], "lr": 0.5})
    before = new.detach().clone()
    assert new.grad is not None
    new.grad.fill_(1.0)
    optimizer.step()
    assert torch.equal(new, before - 0.5)
    assert optimizer._plan is not None
    assert [launch.table.updates for launch in optimizer._plan.launches] == [1, 1]


def test_a_group_that_shares_memory_is_not_added():
    optimizer = RMSpropAsync([Parameter(torch.ones(3))], flat=True)
    storage = torch.ones(10)
    group = {"params": [Parameter(storage[:6]), Parameter(storage[4:])]}
    with pytest.raises(ValueError, match="param 0 in group 1 and param 1 in group 1 must not"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 1
