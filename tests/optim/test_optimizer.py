"""The optimizer as torch's users know optimizers: groups, closures, hooks, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from math import nan
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hogstream.optim import RMSprop, RMSpropAsync
from optim_testing import parameters, step_along


def test_groups_have_hyperparameters_of_their_own():
    a, b, c = (Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [a]}, {"params": b, "lr": 0.5}, {"params": [c], "maximize": True}]
    optimizer = RMSpropAsync(groups, lr=0.25, alpha=0.0, eps=0.0)
    for param in (a, b, c):
        param.grad = torch.full((3,), 4.0)
    optimizer.step()  # by lr, as ms is grad squared
    assert [param[0].item() for param in (a, b, c)] == [0.75, 0.5, 1.25]


def test_a_changed_hyperparameter_holds_from_the_next_step_on():
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param], lr=0.25, alpha=0.0, eps=0.0)
    for lr, expected in ((0.25, 0.75), (0.5, 0.25)):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(3)
        optimizer.step()
        assert param[0].item() == expected


def test_an_added_group_has_state_and_is_updated():
    old, new = Parameter(torch.ones(2)), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([old], lr=0.25, alpha=0.0, eps=0.0)
    optimizer.add_param_group({"params": new, "lr": 0.5})
    assert optimizer.state[new]["square_avg"].shape == (3,)
    new.grad = torch.ones(3)
    optimizer.step()
    assert (old[0].item(), new[0].item()) == (1.0, 0.5)


PARAMS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "generator": lambda module: module.parameters(),
    "named": lambda module: module.named_parameters(),
    "group_of_generator": lambda module: [{"params": module.parameters()}],
    "group_of_named": lambda module: [{"params": module.named_parameters()}],
}


@pytest.mark.parametrize("params_of", PARAMS.values(), ids=PARAMS.keys())
def test_takes_parameters_in_the_forms_that_torch_takes(params_of):
    module = torch.nn.Linear(3, 2)
    optimizer = RMSpropAsync(params_of(module))
    before = [param.detach().clone() for param in module.parameters()]
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    for param, old in zip(module.parameters(), before, strict=True):
        assert optimizer.state[param]["step"].item() == 1
        assert torch.all(param < old)  # whose gradients are all 1


def test_saves_the_names_of_named_parameters():
    module = torch.nn.Linear(3, 2)
    saved = RMSpropAsync(module.named_parameters()).state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("fails", [False, True])
def test_torchs_profiler_sees_each_step(fails):
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param])

    def closure() -> float:
        param.grad = torch.ones(3)
        if fails:
            raise ArithmeticError("the closure failed")
        return 0.0

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(2):
            with pytest.raises(ArithmeticError) if fails else nullcontext():
                optimizer.step(closure)
    counts = {row.key: row.count for row in profiler.key_averages()}
    assert counts["Optimizer.step#RMSpropAsync.step"] == 2


def test_a_closure_is_called_once_with_gradients_on():
    param = Parameter(torch.full((3,), 2.0))
    optimizer = RMSpropAsync([param], lr=0.25, alpha=0.0, eps=0.0)
    calls: list[Any] = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert param.tolist() == [1.75] * 3


def test_autograd_notices_the_step():
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param])
    loss = param.square().sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Halved(RMSpropAsync):
    """A step of a subclass's own, which calls ours."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            param.grad /= 2
        return super().step(closure)


HOOKS = {
    "of one": ("register_step_pre_hook", "register_step_post_hook"),
    "of all": (
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ),
}


@pytest.mark.parametrize("kind", [RMSpropAsync, Halved])
@pytest.mark.parametrize("places", HOOKS.values(), ids=HOOKS)
def test_step_hooks_run_around_the_update(places, kind):
    param = Parameter(torch.ones(()))
    optimizer = kind([param], lr=0.25, alpha=0.0, eps=0.0)
    seen = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((param.item(), args[1:], sorted(kwargs)))

    registers = [getattr(optimizer, place) if isinstance(place, str) else place for place in places]
    handles = [register(note) for register in registers]
    try:
        for _ in range(2):
            param.grad = torch.ones(())
            optimizer.step(closure=None)
    finally:
        for handle in handles:
            handle.remove()
    param.grad = torch.ones(())
    optimizer.step()
    assert param.item() == 0.25
    assert seen == [(value, (), ["closure"]) for value in (1.0, 0.75, 0.75, 0.5)]


@pytest.mark.parametrize("all_threads", [False, True])
@pytest.mark.parametrize("kind", [RMSpropAsync, torch.optim.RMSprop])
def test_a_profiler_sees_each_step(kind, all_threads):
    param = Parameter(torch.ones(()))
    optimizer = kind([param])
    config = torch.profiler._ExperimentalConfig(  # type: ignore[attr-defined]
        profile_all_threads=all_threads
    )
    with torch.profiler.profile(acc_events=True, experimental_config=config) as profiler:
        for _ in range(2):
            param.grad = torch.ones(())
            optimizer.step()
    name = f"Optimizer.step#{kind.__name__}.step"
    assert [event.count for event in profiler.key_averages() if event.key == name] == [2]


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda values: values.mT.contiguous().mT,
    "gaps": lambda values: values.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda values: torch.cat([torch.zeros(3), values.flatten()])[3:].view(values.shape),
    "channels_last": lambda values: values.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("lay_out", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_in_another_memory_layout(memory_format, lay_out):
    values = torch.arange(1.0, 121.0).reshape(2, 3, 4, 5)
    param = Parameter(values.clone(memory_format=memory_format))
    optimizer = RMSpropAsync([param], lr=0.5, alpha=0.0, eps=0.0)
    param.grad = lay_out(values.clone())
    layout, grad = param.grad.stride(), param.grad
    optimizer.step()
    assert torch.equal(optimizer.state[param]["square_avg"], values.square())
    assert torch.equal(param, values - 0.5)
    assert param.grad is grad  # and is left as it was
    assert torch.equal(grad, values)
    assert grad.stride() == layout


def test_an_expanded_gradient():
    param = Parameter(torch.ones(4))
    optimizer = RMSpropAsync([param], lr=0.5, alpha=0.0, eps=0.0)
    param.grad = torch.ones(1).expand(4)
    optimizer.step()
    assert param.tolist() == [0.5] * 4


ONES = Parameter(torch.ones(3))
FLOAT8 = Parameter(torch.ones(3).to(torch.float8_e4m3fn))
SPARSE = torch.ones(3).to_sparse().requires_grad_()
GAPS = Parameter(torch.ones(6)[::2])
DTYPES = "must be float16, bfloat16, float32 or float64"
FINITE = "must be a finite number >= 0"

# Each message with the arguments that it refuses.
WRONG_TYPES: dict[str, dict[str, Any]] = {
    f"weight_decay {FINITE}, got 'small'": {"weight_decay": "small"},
    "maximize must be True or False, got 1": {"maximize": 1},
    "centered must be True or False, got 1": {"centered": 1},
    "differentiable must be True or False, got 'yes'": {"differentiable": "yes"},
    "foreach must be True, False or None, got 'yes'": {"foreach": "yes"},
    f"param 1 {DTYPES}, got float8_e4m3fn": {"params": [ONES, FLOAT8]},
    "ordered collections": {"params": [{"params": {ONES, Parameter(torch.ones(3))}}]},
}
WRONG_VALUES: dict[str, dict[str, Any]] = {
    f"lr {FINITE}, got -1.0": {"lr": -1},
    f"lr {FINITE}, got -2.0": {"params": [{"params": [ONES], "lr": -2}]},
    "alpha must be a number >= 0 and <= 1, got 1.5": {"alpha": 1.5},
    f"momentum {FINITE}, got -0.5": {"momentum": -0.5},
    f"initial_accumulator_value {FINITE}, got -1": {"initial_accumulator_value": -1},
    "flat must be False with differentiable=True": {"flat": True, "differentiable": True},
    "foreach must be False with differentiable=True": {"foreach": True, "differentiable": True},
    "capturable must be False with differentiable": {"capturable": True, "differentiable": True},
    f"eps {FINITE}, got nan": {"eps": nan},
    "backend must be one of triton, numba, numpy or None, got 'cuda'": {"backend": "cuda"},
    "param 0 must be dense, got layout sparse_coo": {"params": [SPARSE]},
    "param 1 must fill one block of memory": {"params": [ONES, GAPS]},
}


@pytest.mark.parametrize(("message", "arguments"), WRONG_TYPES.items(), ids=WRONG_TYPES.keys())
def test_refuses_arguments_of_a_wrong_type(message, arguments):
    with pytest.raises(TypeError, match=re.escape(message)):
        RMSpropAsync(**{"params": [ONES]} | arguments)


@pytest.mark.parametrize(("message", "arguments"), WRONG_VALUES.items(), ids=WRONG_VALUES.keys())
def test_refuses_arguments_out_of_range(message, arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        RMSpropAsync(**{"params": [ONES]} | arguments)


@pytest.mark.parametrize(
    "group",
    [{"params": [ONES], "lr": -1}, {"params": [ONES, FLOAT8]}, {"params": [ONES, GAPS]}],
    ids=["lr", "dtype", "layout"],
)
def test_a_refused_group_is_not_added(group):
    (param,) = parameters((3,))
    optimizer = RMSpropAsync([param])
    with pytest.raises((TypeError, ValueError), match=r"lr must|param 1 must"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == {param}


def make_sparse(_: RMSpropAsync, bad: Parameter) -> None:
    bad.grad = torch.ones(2, 3).to_sparse()


def make_alias(_: RMSpropAsync, bad: Parameter) -> None:
    bad.grad = bad.detach()


def make_longer(_: RMSpropAsync, bad: Parameter) -> None:
    bad.grad = None
    bad.data = torch.ones(2, 4)
    bad.grad = torch.ones(2, 4)


def make_lr_negative(optimizer: RMSpropAsync, _: Parameter) -> None:
    optimizer.param_groups[1]["lr"] = -1.0


BAD_STEPS: dict[Callable[[RMSpropAsync, Parameter], None], str] = {
    make_sparse: "grad of param 0 in group 1 must be dense, or of layout torch.sparse_coo and "
    "sparse in its first axis alone, got 2 sparse axes",
    make_alias: "must not overlap in memory",
    make_longer: "square_avg of param 0 in group 1 must be dense and have the shape of "
    "param 0 in group 1, (2, 4), got strided, (2, 3)",
    make_lr_negative: "lr must be a finite number >= 0, got -1.0",
}


@pytest.mark.parametrize("spoil", BAD_STEPS)
def test_a_refused_step_changes_no_parameter(spoil):
    good, bad, last = parameters((3,), (2, 3), (3,))
    optimizer = RMSpropAsync([{"params": [good]}, {"params": [bad]}, {"params": [last]}])
    step_along(optimizer, first_seed=0)
    spoil(optimizer, bad)
    before = [tensor.tolist() for tensor in all_tensors(optimizer)]
    with pytest.raises(ValueError, match=re.escape(BAD_STEPS[spoil])):
        optimizer.step()
    assert [tensor.tolist() for tensor in all_tensors(optimizer)] == before


def all_tensors(optimizer: RMSpropAsync) -> list[torch.Tensor]:
    return [
        tensor for param, state in optimizer.state.items() for tensor in (param, *state.values())
    ]


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.9), ("centered", True)])
@pytest.mark.parametrize("flat", [False, True])
def test_an_option_that_is_set_later_is_honoured_from_then_on(name, value, flat):
    ours, theirs = (Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    optimizers = RMSprop([ours], flat=flat), torch.optim.RMSprop([theirs])
    for step in range(9):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.param_groups[0][name] = value if step >= 3 and step != 6 else type(value)(0)
            param.grad = torch.tensor([0.5, -0.25]) * (step + 1)
            if step == 3:  # torch has made its state, and makes no more
                more = {"momentum_buffer": torch.zeros(2), "grad_avg": torch.zeros(2)}
                optimizers[1].state[theirs].update(more)
            optimizer.step()
        torch.testing.assert_close(ours, theirs)
