"""Parameters of 16 bits, gradients of other dtypes, loss scaling, and clipping in the same pass."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from hogstream.kernels import rounding
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import check_operands
from hogstream.optim import RMSprop, RMSpropAsync
from optim_testing import parameters, step_along
from triton_testing import DEVICE, on_tritons_device
from update_testing import BACKENDS, CPU_BACKENDS, DTYPES, bits, normal

HALF = [torch.float16, torch.bfloat16]
SHAPES = [(3, 5), (), (300,)]


def stepped(steps: int, dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
    """Parameters and state after some steps."""
    params = [each.detach() for each in parameters(*SHAPES, dtype=dtype)]
    optimizer = RMSpropAsync(params, **options)
    step_along(optimizer, first_seed=0, steps=steps)
    return [*params, *(value for each in params for value in optimizer.state[each].values())]


OPTIONS: list[dict[str, Any]] = [
    {"stochastic_rounding": True},
    {"stochastic_rounding": True, "seed": 7, "momentum": 0.9, "weight_decay": 0.1},
    {"kahan_sum": True},
    {"kahan_sum": True, "centered": True, "momentum": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_round_alike(backend, dtype, options):
    if backend.device != "cpu":
        pytest.skip("steps along gradients on the CPU")
    results = [stepped(3, dtype, backend=name, **options) for name in ("numpy", backend.name)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_wide_parameters_are_rounded_as_ever(dtype, options):
    for one, other in zip(stepped(2, dtype, **options), stepped(2, dtype), strict=True):
        assert torch.equal(one, other)


def grid_around(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of a dtype next to others, towards 0 and away from it, in float64."""
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).double()
    exact = exact[exact.isfinite()].unique()
    place = torch.searchsorted(exact, values.double())
    below, above = exact[(place - 1).clamp(min=0)], exact[place.clamp(max=len(exact) - 1)]
    hit = above == values
    return torch.where(hit, above, below), above


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rounding_by_chance_is_right_in_the_mean(backend, dtype):
    """A step of a tenth of the distance to the next number: one of ten is rounded away."""
    for start in (1.0, -3.0, 2.0**-16):  # the last one is denormal in float16
        param = torch.full((40_000,), start).to(dtype)
        step = 0.1 * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(start)))
        step = max(step, 0.1 * 2.0**-24 if dtype == torch.float16 else 0.0)
        optimizer = RMSpropAsync(
            [param], lr=step, alpha=0.0, eps=0.0, stochastic_rounding=True, backend=backend.name
        )
        param.grad = torch.ones_like(param)
        optimizer.step()
        target = torch.tensor(float(torch.tensor(start).to(dtype)) - step)
        below, above = grid_around(target, dtype)
        assert set(param.double().unique().tolist()) == {float(below), float(above)}
        spread = float(above - below) * 0.3 / 40_000**0.5
        assert abs(float(param.double().mean()) - float(target)) < 5 * spread


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_not_finite_is_rounded_to_itself(dtype):
    limits = torch.finfo(dtype)
    start = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, limits.max, -limits.max])
    for backend in ("numpy", "numba"):
        param = start.to(dtype)
        optimizer = RMSpropAsync([param], lr=0.0, stochastic_rounding=True, backend=backend)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert torch.equal(bits(param), bits(start.to(dtype)))


def test_each_step_launch_and_seed_rounds_anew():
    keys = {
        rounding.key_of_step(seed, step, launch)
        for seed in range(10)
        for step in range(10)
        for launch in range(10)
    }
    assert len(keys) == 1000


def test_a_resumed_run_rounds_as_one_that_went_on():
    (param,) = parameters((500,), dtype=torch.bfloat16)
    optimizer = RMSpropAsync([param], lr=1e-3, stochastic_rounding=True, seed=3)
    step_along(optimizer, first_seed=0, steps=3)
    file = io.BytesIO()
    torch.save((param, optimizer.state_dict()), file)
    file.seek(0)
    step_along(optimizer, first_seed=3, steps=3)

    again, saved = torch.load(file, weights_only=False)
    resumed = RMSpropAsync([again], stochastic_rounding=True)
    resumed.load_state_dict(saved)
    step_along(resumed, first_seed=3, steps=3)
    assert torch.equal(again, param)


@pytest.mark.parametrize("options", [{"kahan_sum": True}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_small_steps_are_not_lost(dtype, options, flat):
    """Without either they are: each is less than half of the last place."""
    ends = []
    either: list[dict[str, Any]] = [options, {}]
    for each in either:
        param = Parameter(torch.full((200,), 8.0, dtype=dtype))
        optimizer = RMSpropAsync([param], lr=1e-3, alpha=0.0, eps=0.0, flat=flat, **each)
        for _ in range(200):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends.append(param.detach().float().mean().item())
    assert ends[0] == pytest.approx(7.8, abs=0.016)  # half of the distance of bfloat16
    assert ends[1] == 8.0


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_may_have_another_dtype(backend, dtype, grad_dtype):
    """It is that in the compute type, rounded once if that is narrower."""
    device = backend.device
    results = []
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for converted in (False, True):
        param = normal(50, dtype, seed=0).to(device)
        optimizer = RMSpropAsync([param], weight_decay=0.1, backend=backend.name)
        for step in range(2):
            grad = normal(50, torch.float64, seed=1 + step).to(grad_dtype)
            param.grad = torch.zeros_like(param)
            param.grad.data = grad.to(compute if converted else grad_dtype).to(device)
            optimizer.step()
        results.append((param, optimizer.state[param]["square_avg"]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def unscaled_and_clipped(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """What people write around an optimizer that does neither."""
    scaler.unscale_(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    scaler.step(optimizer)
    scaler.update()


def in_the_kernel(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_and_clips_as_torch_does(dtype, flat):
    ours, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    optimizers: list[tuple[torch.optim.Optimizer, Callable[..., None]]] = [
        (RMSprop(ours, momentum=0.9, max_grad_norm=0.5, flat=flat), in_the_kernel),
        (torch.optim.RMSprop(theirs, momentum=0.9), unscaled_and_clipped),
    ]
    pairs = [(*each, torch.amp.GradScaler("cpu", init_scale=1024.0)) for each in optimizers]
    for number in range(6):
        for params, (optimizer, step, scaler) in zip((ours, theirs), pairs, strict=True):
            optimizer.zero_grad()
            for seed, param in enumerate(params):
                values = normal(param.numel(), dtype, seed=10 * number + seed).reshape(param.shape)
                values = values * torch.inf if number == 3 and seed == 1 else values
                (param * values).sum().mul(scaler.scale(torch.ones(()))).backward()
            step(optimizer, scaler)
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    scales = [scaler.get_scale() for _, _, scaler in pairs]
    assert scales[0] == scales[1] == 512.0
    for (optimizer, _, _), param in zip(pairs, (ours[0], theirs[0]), strict=True):
        assert optimizer.state[param]["step"] == 5  # one was left out


def test_gradients_of_16_bits_are_added_up_in_32():
    param = Parameter(torch.zeros(10_000, dtype=torch.float16))
    optimizer = RMSpropAsync([param], lr=1.0, alpha=0.0, eps=0.0, max_grad_norm=1.0)
    param.grad = torch.full_like(param, 60_000.0)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full_like(param, -1.0))
    assert optimizer.state[param]["square_avg"][0] == pytest.approx(1e-4, rel=1e-5)


@on_tritons_device
@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("tensors", [1, 2])
def test_triton_reads_the_factor_and_what_was_found_where_they_are(found, tensors):
    from hogstream.kernels.backends.triton_launch import update_

    params, grads = [normal(2000, torch.float32, seed=s).to(DEVICE) for s in range(2)], []
    before = [param.clone() for param in params]
    operands = []
    for param in params[:tensors]:
        grads.append(torch.full_like(param, 8.0))
        operands.append(check_operands(param, grads[-1], torch.zeros_like(param)))
    numbers = Hyperparameters(lr=1.0, alpha=0.0, eps=1.0)
    update_(
        LaunchTable(operands),
        numbers,
        grad_factor=torch.tensor(0.125, dtype=torch.float64, device=DEVICE),
        found_inf=torch.tensor(found, device=DEVICE),
    )
    for param, old, each in zip(params, before, operands, strict=False):
        step = 0.0 if found else 1 / torch.tensor(2.0).sqrt()
        assert torch.equal(param.cpu(), (old.cpu() - step))
        assert torch.equal(each.ms, torch.full_like(each.ms, 0.0 if found else 1.0))


WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "kahan_sum must be False with stochastic_rounding=True": (
        ValueError,
        {"kahan_sum": True, "stochastic_rounding": True},
    ),
    "max_grad_norm must be a finite number > 0 or None, got 0": (ValueError, {"max_grad_norm": 0}),
    "max_grad_norm must be a finite number > 0 or None, got 'x'": (
        ValueError,
        {"max_grad_norm": "x"},
    ),
    "max_grad_norm must be None with differentiable=True": (
        ValueError,
        {"max_grad_norm": 1.0, "differentiable": True},
    ),
    "kahan_sum must be False with differentiable=True": (
        ValueError,
        {"kahan_sum": True, "differentiable": True},
    ),
    "seed must be an integer, got 0.5": (TypeError, {"seed": 0.5}),
    "stochastic_rounding must be True or False, got 1": (TypeError, {"stochastic_rounding": 1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_refuses_what_cannot_be_honoured(message):
    error, options = WRONG[message]
    with pytest.raises(error, match=message):
        RMSpropAsync([Parameter(torch.ones(3))], **options)


def test_a_copy_clips_as_its_original():
    optimizer = RMSpropAsync(parameters(*SHAPES), max_grad_norm=0.5)
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        step_along(each, first_seed=0)
    for one, other in zip(
        optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(one, other)


DIFFERENTIABLE: dict[str, tuple[dict[str, Any], Any]] = {
    "max_grad_norm": ({"max_grad_norm": 0.5}, None),
    "flat": ({"flat": True}, None),
    "grad_scale": ({}, lambda optimizer: setattr(optimizer, "grad_scale", torch.tensor(8.0))),
    "kahan_sum": ({}, lambda optimizer: optimizer.param_groups[1].update(kahan_sum=True)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_differentiable_group_leaves_nothing_out_without_a_word(name):
    options, ask = DIFFERENTIABLE[name]
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    groups = [{"params": [params[0]]}, {"params": [params[1]]}]
    optimizer = RMSpropAsync(groups, **options)
    optimizer.param_groups[0]["differentiable"] = True
    assert not optimizer._step_supports_amp_scaling
    if ask is not None:
        ask(optimizer)
    for param in params:
        param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=f"{name} must be off where a group is differentiable"):
        optimizer.step()
    assert all(torch.equal(param, torch.ones(3)) for param in params)


def test_a_step_that_fails_leaves_no_scale_behind():
    (param,) = parameters((3,))
    optimizer = RMSpropAsync([param])
    for failing in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer.param_groups[0]["alpha"] = 2.0 if failing else 0.0
        param.grad = torch.full((3,), 8.0)
        scaler.scale(torch.ones(()))
        if failing:
            with pytest.raises(ValueError, match="alpha must be"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
    assert optimizer.state[param]["square_avg"].tolist() == [1.0] * 3


def test_a_scaler_over_no_gradients_does_nothing():
    (param,) = parameters((3,))
    before = param.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(RMSpropAsync([param]))
    assert torch.equal(param, before)


def test_what_rounding_left_is_forgotten_without_kahan_sum():
    param = Parameter(torch.full((3,), 8.0, dtype=torch.bfloat16))
    optimizer = RMSpropAsync([param], lr=1e-3, alpha=0.0, eps=0.0, kahan_sum=True)
    for kahan_sum, lr in ((True, 1e-3), (False, 0.0), (True, 0.0)):
        optimizer.param_groups[0].update(kahan_sum=kahan_sum, lr=lr)
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert not optimizer.state[param]["kahan_comp"].any()


def test_state_that_was_replaced_stays_when_momentum_is_turned_on():
    (param,) = parameters((3,))
    optimizer = RMSpropAsync([param], flat=True, alpha=1.0)
    optimizer.state[param]["square_avg"] = torch.full((3,), 7.0)
    assert param.grad is not None
    for momentum in (0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        param.grad.fill_(1.0)
        optimizer.step()
    assert optimizer.state[param]["square_avg"].tolist() == [7.0] * 3


def test_updates_that_are_not_reached_together_are_rounded_by_other_chances():
    params = [Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = RMSpropAsync(params, lr=2e-3, alpha=0.0, eps=0.0, stochastic_rounding=True)
    steps = []
    for reached in (params[0], params[1]):
        optimizer.zero_grad()
        reached.grad = torch.ones_like(reached)
        optimizer.step()
        steps.append(reached.detach().clone())
    assert not torch.equal(*steps)
