"""Every option of torch's RMSprop, and those of TensorFlow's, beside what they are named after."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from hogstream.optim import RMSprop, RMSpropAsync
from optim_testing import parameters, step_along
from update_testing import CPU_BACKENDS

SHAPES = [(), (7,), (3, 5), (2, 3, 4, 5), (0,)]

COMBINATIONS = [
    {"momentum": momentum, "centered": centered, "weight_decay": decay, "maximize": maximize}
    for momentum, centered, decay, maximize in product(
        (0, 0.9), (False, True), (0, 0.1), (False, True)
    )
]
STEPS = 100
# One float32 rounding a step, of numbers up to 4; and as little of float64.
ROUNDINGS = {torch.float32: STEPS * 2.0**-22, torch.float64: STEPS * 2.0**-51}


def test_has_the_signature_of_torch():
    ours, theirs = (inspect.signature(each).parameters for each in (RMSprop, torch.optim.RMSprop))
    shared = [(name, p.default, p.kind) for name, p in theirs.items() if name != "params"]
    for name, default, kind in shared:
        assert (ours[name].default, ours[name].kind) == (default, kind), name
    assert list(ours)[: len(theirs)] == list(theirs)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_follows_torch(dtype, options, flat):
    ours, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    step_along(RMSprop(ours, flat=flat, **options), first_seed=0, steps=STEPS)
    step_along(torch.optim.RMSprop(theirs, **options), first_seed=0, steps=STEPS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDINGS[dtype])


@pytest.mark.parametrize("options", COMBINATIONS[::3], ids=str)
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_complex_parameter_is_its_real_view(backend, options):
    complex_params = [
        Parameter(torch.randn(5, 3, dtype=torch.complex64)),
        Parameter(1j * torch.ones(2)),
    ]
    real_params = [torch.view_as_real(each.detach()).clone() for each in complex_params]
    optimizers = [
        RMSprop(params, backend=backend, **options) for params in (complex_params, real_params)
    ]
    for step in range(4):
        for of_complex, of_real in zip(complex_params, real_params, strict=True):
            grad = torch.randn(of_complex.shape, dtype=torch.complex64)
            of_complex.grad = grad.conj() if step == 2 else grad.clone()
            of_real.grad = torch.view_as_real(of_complex.grad.resolve_conj()).clone()
        for optimizer in optimizers:
            optimizer.step()
    for of_complex, of_real in zip(complex_params, real_params, strict=True):
        assert torch.equal(torch.view_as_real(of_complex.detach()), of_real)
        for name, value in optimizers[0].state[of_complex].items():
            if name != "step":
                assert value.dtype == torch.complex64
                assert torch.equal(torch.view_as_real(value), optimizers[1].state[of_real][name])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("options", COMBINATIONS[::5], ids=str)
def test_variant_of_tensorflow(backend, options):
    """After timm's ``RMSpropTF``: ``ms`` starts at 1, epsilon inside, ``lr`` inside momentum."""
    (param,) = parameters((50,), dtype=torch.float64)
    p, ms, ga, buf = param.detach().clone(), torch.ones(50).double(), 0.0, 0.0
    optimizer = RMSpropAsync(
        [param], lr=0.02, alpha=0.9, eps=1e-3, initial_accumulator_value=1.0,
        lr_in_momentum=True, backend=backend.name, **options,
    )  # fmt: skip
    for step in range(20):
        step_along(optimizer, first_seed=step)
        assert param.grad is not None
        g = -param.grad if options["maximize"] else param.grad
        g = g + options["weight_decay"] * p
        ms = ms + 0.1 * (g**2 - ms)
        ga = ga + 0.1 * (g - ga) if options["centered"] else 0.0
        buf = options["momentum"] * buf + 0.02 * g / (ms - ga**2 + 1e-3).sqrt()
        p = p - buf
    torch.testing.assert_close(param.detach(), p, rtol=1e-12, atol=1e-12)


FORMS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "eps": 0.1},
    {"momentum": 0.5, "lr_in_momentum": True, "eps_inside_sqrt": True, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "initial_accumulator_value": 1.0},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_differentiable_step_goes_where_others_go(options):
    """To the last bit but one: torch's roots are not rounded to nearest."""
    results = []
    for differentiable in (False, True):
        params = [each.detach() for each in parameters(*SHAPES)]
        optimizer = RMSprop(params, differentiable=differentiable, **options)
        step_along(optimizer, first_seed=0, steps=3)
        results.append((params, [optimizer.state[each] for each in params]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_autograd_goes_through_a_differentiable_step(options):
    def stepped(start: torch.Tensor, grad: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        param = start.clone()
        optimizer = RMSprop([param], lr=lr, differentiable=True, **options)
        for _ in range(2):
            param.grad = grad.clone()
            optimizer.step()
        return param

    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (*inputs, lr))


@pytest.mark.parametrize("lr", [torch.tensor(0.02), torch.tensor([0.02])], ids=["scalar", "one"])
@pytest.mark.parametrize("foreach", [None, False])
def test_lr_may_be_a_tensor_that_is_changed_in_place(lr, foreach):
    lrs = [lr.clone(), lr.clone()]
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    optimizers = [
        RMSprop(ours, lr=lrs[0], foreach=foreach),
        torch.optim.RMSprop(theirs, lr=lrs[1], foreach=False),
    ]
    for step in range(4):
        for optimizer, each in zip(optimizers, lrs, strict=True):
            step_along(optimizer, first_seed=step)
            assert optimizer.param_groups[0]["lr"] is each
            each.mul_(0.5)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
