"""Parameters that others change, share, convert or put into a group: as with torch, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Conv2d, Flatten, Linear, Parameter, Sequential
from torch.optim import Optimizer

from hogstream.optim import RMSprop, RMSpropAsync
from optim_testing import parameters, step_along

Change = Callable[[Sequential], object]


def swap_data(model: Sequential) -> None:
    for param in model.parameters():
        param.data = param.data.clone() + 1


def transpose_in_place(model: Sequential) -> None:
    weight = model.get_parameter("2.weight")
    weight.data = weight.data.T.contiguous().T


def to_channels_last(model: Sequential) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def freeze_first(model: Sequential) -> None:
    model[0].requires_grad_(False)


CHANGES: dict[str, Change] = {
    "to float64": lambda model: model.double(),
    "to bfloat16": lambda model: model.bfloat16(),
    "to channels last": lambda model: to_channels_last(model),
    "to both": lambda model: to_channels_last(model.double()),
    "swapped": swap_data,
    "laid out otherwise": transpose_in_place,
    "frozen": freeze_first,
    "unfrozen": lambda model: model.requires_grad_(True),
}


def train(make: Callable[..., Optimizer], change: Change, when: int) -> list[torch.Tensor]:
    """What parameters are after six steps, of which some number comes before a change."""
    torch.manual_seed(0)
    model = Sequential(Conv2d(3, 4, 2), Flatten(), Linear(16, 3))
    model[2].bias.requires_grad_(False)
    optimizer = make(model.parameters(), lr=0.01, momentum=0.5)
    for step in range(6):
        if step == when:
            change(model)
        optimizer.zero_grad()
        dtype = model.get_parameter("2.weight").dtype
        images = torch.linspace(-1, 1, 54, dtype=dtype).reshape(2, 3, 3, 3)
        model(images).square().sum().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("when", [0, 3], ids=["before the first step", "between steps"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_what_is_done_to_a_model_is_followed_as_by_torch(flat, change, when):
    ours = train(lambda params, **options: RMSprop(params, flat=flat, **options), change, when)
    theirs = train(torch.optim.RMSprop, change, when)
    tolerance = 0.1 if ours[0].dtype == torch.bfloat16 else 1e-4  # torch has its state in bfloat16
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert [each.stride() for each in ours] == [each.stride() for each in theirs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_follows_its_parameter_and_keeps_its_values(dtype):
    (param,) = parameters((2, 3, 4, 4))
    optimizer = RMSprop([param], momentum=0.9, centered=True)
    step_along(optimizer, first_seed=0, steps=2)
    before = {name: value.clone() for name, value in optimizer.state[param].items()}
    param.data = param.data.to(dtype, memory_format=torch.channels_last)
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0].update(alpha=1.0, momentum=1.0, lr=0.0)
    optimizer.step()
    for name, value in optimizer.state[param].items():
        if name == "step":
            assert value == 3
            continue
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.stride() == param.stride()
        assert torch.equal(value, before[name].to(value.dtype))


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_a_parameter_may_change_its_shape_before_the_first_step_only(flat):
    (param,) = parameters((3,))
    optimizer = RMSpropAsync([param], flat=flat, initial_accumulator_value=1.0)
    param.grad, param.data = None, torch.ones(2, 4)
    step_along(optimizer, first_seed=0)
    assert optimizer.state[param]["square_avg"].shape == (2, 4)
    param.grad, param.data = None, torch.ones(5)
    param.grad = torch.ones(5)
    with pytest.raises(ValueError, match="square_avg of param 0 in group 0 must be dense and have"):
        optimizer.step()
    assert param.tolist() == [1.0] * 5


def convert(param: Parameter) -> None:
    param.data = param.data.double()


def lay_out_otherwise(param: Parameter) -> None:
    param.data = param.data.T.contiguous().T


@pytest.mark.parametrize("change", [convert, lay_out_otherwise])
def test_state_that_others_share_does_not_leave_them(change):
    (param,) = parameters((3, 4))
    optimizer = RMSpropAsync([param]).share_memory()
    change(param)
    param.grad = torch.ones_like(param)
    before = param.tolist()
    with pytest.raises(RuntimeError, match=r"param 0 in group 0 has outgrown square_avg.*convert"):
        optimizer.step()
    assert param.tolist() == before
    assert optimizer.state[param]["square_avg"].is_shared()


def same_twice() -> list[Parameter]:
    (param,) = parameters((5,))
    return [param, param]


def tied_by_data() -> list[Parameter]:
    first, second, last = parameters((5,), (5,), (5,))
    last.data = first.data
    return [first, second, last]


def overlapping() -> list[Parameter]:
    (buffer,) = parameters((12,))
    data = buffer.detach()
    return [Parameter(data[:6]), Parameter(data[4:9]), Parameter(data[5:12])]


def views_of_one_buffer() -> list[Parameter]:
    (buffer,) = parameters((12,))
    return [Parameter(part) for part in buffer.detach().split(5)]


def odd_ones() -> list[Parameter]:
    shapes = parameters((), (0,), (3, 0), (1, 6, 1), (2, 3, 4, 5), (4, 6))
    shapes[4].data = shapes[4].data.to(memory_format=torch.channels_last)
    shapes[5].data = shapes[5].data.T.contiguous().T
    return [*shapes, Parameter(shapes[5].data.clone().permute(1, 0))]


FOREIGN = [same_twice, tied_by_data, overlapping, views_of_one_buffer, odd_ones]


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("make", FOREIGN)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_is_updated_in_turn_as_by_torch(make, backend):
    """For several steps, as the plan of the first is followed by others."""
    optimizers = [RMSprop(make(), momentum=0.5, backend=backend), torch.optim.RMSprop(make())]
    optimizers[1].param_groups[0]["momentum"] = 0.5
    for optimizer in optimizers:
        step_along(optimizer, first_seed=0, steps=4)
    groups = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    torch.testing.assert_close(*groups, rtol=1e-5, atol=1e-5)
    counts = [[float(o.state[p]["step"]) for p in o.param_groups[0]["params"]] for o in optimizers]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", [RMSprop, RMSpropAsync, torch.optim.RMSprop])
def test_a_duplicate_is_warned_of_as_by_torch(kind):
    (param,) = parameters((5,))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        kind([param, param])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        kind([{"params": [param]}, {"params": [param]}])


@pytest.mark.parametrize("make", [same_twice, tied_by_data, overlapping])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_flat_memory_is_for_parameters_that_share_none(make):
    params = make()
    pointers = [param.data_ptr() for param in params]
    with pytest.raises(ValueError, match="must not overlap in memory"):
        RMSpropAsync(params, flat=True)
    assert [param.data_ptr() for param in params] == pointers


def grad_in_next(params: list[Parameter], optimizer: RMSpropAsync) -> None:
    params[0].grad = params[1].detach()


def state_in_next(params: list[Parameter], optimizer: RMSpropAsync) -> None:
    optimizer.state[params[0]]["square_avg"] = params[1].detach()


def own_state(params: list[Parameter], optimizer: RMSpropAsync) -> None:
    optimizer.state[params[1]]["square_avg"] = params[1].detach()


@pytest.mark.parametrize("spoil", [grad_in_next, state_in_next, own_state])
def test_what_is_written_as_one_thing_may_be_no_other(spoil):
    params = tied_by_data()
    optimizer = RMSpropAsync(params)
    for param in params:
        param.grad = torch.ones(5)
    before = [param.tolist() for param in params]
    spoil(params, optimizer)
    with pytest.raises(ValueError, match="must not overlap in memory"):
        optimizer.step()
    assert [param.tolist() for param in params] == before


def test_parameters_of_one_state_are_updated_in_turn():
    results = []
    for make in (RMSprop, torch.optim.RMSprop):
        params = parameters((5,), (5,))
        optimizer = make(params)
        step_along(optimizer, first_seed=0)
        optimizer.state[params[1]] = optimizer.state[params[0]]
        step_along(optimizer, first_seed=1, steps=3)
        results.append([*params, *optimizer.state[params[0]].values()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_an_appended_parameter_is_updated_and_a_removed_one_is_left():
    first, second = parameters((3,), (4,))
    optimizer = RMSpropAsync([first])
    optimizer.param_groups[0]["params"].append(second)
    step_along(optimizer, first_seed=0)
    assert optimizer.state[second]["step"] == 1
    optimizer.param_groups[0]["params"].remove(first)
    before = first.tolist()
    step_along(optimizer, first_seed=1)
    assert first.tolist() == before
    assert optimizer.state[second]["step"] == 2


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded": lambda p: torch.tensor(0.5, dtype=p.dtype).expand(p.shape),
    "broadcast over rows": lambda p: torch.ones(p.shape[1], dtype=p.dtype).expand(p.shape),
    "transposed": lambda p: torch.ones(p.shape[::-1], dtype=p.dtype).T,
    "with gaps": lambda p: torch.ones(p.shape[0], 2 * p.shape[1], dtype=p.dtype)[:, ::2],
    "negated": lambda p: torch._neg_view(torch.ones_like(p)),
}


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_gradients_may_change_how_they_are_laid_out_from_step_to_step(flat):
    ours, theirs = parameters((3, 4), (3, 4)), parameters((3, 4), (3, 4))
    optimizers = [RMSprop(ours, flat=flat), torch.optim.RMSprop(theirs)]
    for make in [*GRADIENTS.values(), torch.ones_like, *GRADIENTS.values()]:
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for param in params:
                param.grad = make(param.detach())
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_may_change_their_dtype_from_step_to_step():
    results = []
    for make in (RMSprop, torch.optim.RMSprop):
        params = parameters((3, 4), (3, 4))
        optimizer = make(params)
        for dtype in (torch.float32, torch.float16, torch.float16, torch.float32, torch.bfloat16):
            for param in params:
                param.grad_dtype = None  # any
                param.grad = torch.full(param.shape, 0.5, dtype=dtype)
            optimizer.step()
        results.append([*params, *(optimizer.state[each]["square_avg"] for each in params)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
