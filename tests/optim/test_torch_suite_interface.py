"""Groups, refusals, closures and labels, as torch's tests of its optimizers have them."""

from __future__ import annotations

import re
from inspect import Parameter, signature
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from hogstream.optim import RMSprop
from torch_suite import (
    INFOS,
    LeastSquares,
    Row,
    each_differentiable,
    each_info,
    each_of_torchs,
    each_row,
    give_grads,
    params_in,
    params_of,
)

# Names


def test_the_signature_begins_as_torchs():
    theirs, ours = (
        [(each.name, each.default, each.kind) for each in signature(kind).parameters.values()]
        for kind in (torch.optim.RMSprop, RMSprop)
    )
    assert ours[: len(theirs)] == theirs
    assert Parameter.POSITIONAL_OR_KEYWORD not in {kind for *_, kind in ours[len(theirs) :]}


@each_info
def test_groups_have_torchs_options_under_their_names(info):
    theirs = torch.optim.RMSprop(params_of((2,))).defaults
    assert theirs.keys() <= info.optim_cls(params_of((2,))).defaults.keys()


# Groups


@each_row
def test_groups_that_decay_and_do_not(row):
    problem = LeastSquares.made(row.device)
    groups = [
        {"params": [problem.weight], **row.kwargs},
        {"params": [problem.bias], **row.kwargs, "weight_decay": 0.0},
    ]
    optimizer = Row(row.info, row.device, {}).make(in_groups_alone(groups))
    before = problem.loss().item()
    problem.train(optimizer, steps=20)
    after = problem.loss().item()
    assert after > before if row.ascends else after < before


def in_groups_alone(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups without what is an option of the whole optimizer."""
    whole = ("flat", "capturable")
    return [{name: group[name] for name in group if name not in whole} for group in groups]


@each_row
def test_a_group_whose_learning_rate_is_next_to_nothing_stays(row):
    problem = LeastSquares.made(row.device)
    still = params_of((2,), device=row.device)
    options = {"lr": 1e-3, **row.kwargs}
    groups = in_groups_alone([{"params": problem.params, **options}, {"params": still}])
    optimizer = Row(row.info, row.device, {}).make(groups, lr=1e-28)
    before = problem.loss().item()
    for step in range(20):
        problem.backward()
        give_grads(still, step)
        optimizer.step()
    after = problem.loss().item()
    assert after > before if row.ascends else after < before
    assert_close(still, params_of((2,), device=row.device), rtol=0, atol=0)


@each_of_torchs
def test_groups_step_as_optimizers_of_their_own(row):
    together, apart = LeastSquares.made(row.device), LeastSquares.made(row.device)
    one = row.make([{"params": [together.weight]}, {"params": together.bias, "lr": 0.1}])
    two = row.make([apart.weight]), row.make([{"params": [apart.bias], "lr": 0.1}])
    for _ in range(5):
        together.backward()
        apart.backward()
        for optimizer in (one, *two):
            optimizer.step()
    assert_close(together.params, apart.params, rtol=0, atol=0)


@each_row
def test_an_added_group_is_stepped(row):
    problem, whole = LeastSquares.made(row.device), LeastSquares.made(row.device)
    optimizer = row.make([problem.weight])
    optimizer.add_param_group({"params": problem.bias})
    problem.train(optimizer, steps=3)
    whole.train(row.make(whole.params), steps=3)
    assert_close(problem.params, whole.params, rtol=0, atol=0)


@each_info
def test_a_set_is_refused_and_a_generator_taken(info):
    params = params_of((2,), (3,))
    with pytest.raises(TypeError, match="ordered collections"):
        info.optim_cls([{"params": set(params)}])
    for given in ((each for each in params), iter([{"params": (each for each in params)}])):
        assert params_in(info.optim_cls(given)) == params


@each_info
def test_a_refused_group_leaves_the_optimizer_as_it_was(info):
    params = params_of((2,), (3,))
    optimizer = info.optim_cls(params)
    for wrong in ({"params": params[:1]}, {"params": [torch.ones(1) * params[0]]}):
        with pytest.raises(ValueError, match=r"more than one parameter group|non-leaf"):
            optimizer.add_param_group(wrong)
    assert params_in(optimizer) == params
    assert optimizer.state.keys() <= set(params)


@each_info
def test_no_parameters_are_refused(info):
    with pytest.raises(ValueError, match="empty parameter list"):
        info.optim_cls([])


@each_info
def test_unknown_defaults_of_a_group_are_filled_in(info):
    (param,) = params_of((2,))
    optimizer = info.optim_cls([{"params": [param]}])
    assert optimizer.param_groups[0].keys() - {"params"} == optimizer.defaults.keys()


# Bad input


#: How ours words what torch's own optimizers word otherwise.
WORDS = {"Invalid momentum value: -1.0": "momentum must be a finite number >= 0, got -1.0"}
ERRORS = [
    pytest.param(info, place, id=f"{info.name}-{error.optimizer_error_input.desc}")
    for info in INFOS
    for place, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize(("info", "place"), ERRORS)
def test_refuses_what_torch_refuses(info, place):
    error = info.optim_error_inputs_func("cpu", torch.float32)[place]
    given = error.optimizer_error_input
    words = WORDS.get(error.error_regex, error.error_regex)
    raises = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    params = given.params if given.params is not None else params_of((2,))
    with raises(error.error_type, match=words):
        info.optim_cls(params, **given.kwargs)


@pytest.mark.parametrize("name", ["lr", "eps", "momentum", "weight_decay", "alpha"])
@each_info
def test_refuses_numbers_below_zero(info, name):
    with pytest.raises(ValueError, match=name):
        info.optim_cls(params_of((2,)), **{name: -1.0})


@each_info
def test_capturable_is_refused_on_the_host(info):
    with pytest.raises(ValueError, match="capturable"):
        info.optim_cls(params_of((2,)), capturable=True, backend="numpy")


@each_info
def test_a_sparse_gradient_is_taken_by_ours_alone(info):
    (param,), (before,) = params_of((3,)), params_of((3,))
    optimizer = info.optim_cls([param])
    param.grad = torch.eye(3)[0].to_sparse()
    if info.optim_cls is torch.optim.RMSprop:
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
    else:
        optimizer.step()
        assert param[0] != before[0]
        param.data[0] = before[0]
    assert_close(param, before, rtol=0, atol=0)


@each_differentiable
def test_an_optimizer_can_be_printed(row):
    text = repr(row.make(params_of((2, 3), device=row.device)))
    assert text.startswith(f"{row.info.name} (\nParameter Group 0\n")
    for name in row.kwargs.keys() & {"lr", "alpha", "weight_decay", "momentum", "centered"}:
        assert re.search(rf"^ +{name}: ", text, re.MULTILINE)


# Closures, gradients and graphs


@each_row
def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(row):
    problem = LeastSquares.made(row.device)
    optimizer = row.make(problem.params)
    losses = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        losses.append(problem.backward())
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
        assert not torch.is_grad_enabled()
    assert len(losses) == 1
    assert optimizer.step() is None


@each_row
def test_zero_grad(row):
    problem = LeastSquares.made(row.device)
    optimizer = row.make(problem.params)
    problem.backward()
    optimizer.zero_grad(set_to_none=False)
    for param in problem.params:
        assert param.grad is not None
        assert not param.grad.any()
        assert not param.grad.requires_grad
    optimizer.zero_grad(set_to_none=True)
    assert [param.grad for param in problem.params] == [None, None]


@each_info
def test_zero_grad_cuts_gradients_that_have_a_graph(info):
    (param,) = params_of((3,))
    optimizer = info.optim_cls([param])
    (grad,) = torch.autograd.grad(param.square().sum(), param, create_graph=True)
    param.grad = grad.clone()
    optimizer.zero_grad(set_to_none=False)
    assert param.grad.grad_fn is None
    assert param.grad.tolist() == [0, 0, 0]


@each_differentiable
def test_profilers_see_steps_under_the_name_of_the_class(row):
    problem = LeastSquares.made(row.device)
    optimizer = row.make(problem.params)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        optimizer.step()
        optimizer.zero_grad()
    seen = {event.key for event in profiler.key_averages()}
    labels = {f"Optimizer.{name}#{row.info.name}.{name}" for name in ("step", "zero_grad")}
    assert labels <= seen
