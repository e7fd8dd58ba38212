"""What torch's tests of its optimizers establish, of ours, over torch's own tables of inputs.

Here is what a step does. Beside this file: ``test_torch_suite_differentiable`` for gradients
through steps, ``_interface`` for groups, refusals and closures, ``_state`` for what is saved and
loaded, ``_hooks``, ``_schedulers`` for schedulers and averages of models, and ``_courses`` for
random sequences of all that.

What torch's tests hold of other optimizers, and why it is not here:

- sparse parameters: ``RMSprop`` refuses them, torch's and ours; ours takes sparse gradients.
- ``fused``: torch's ``RMSprop`` has no such option, and ours is always fused. That it gives the
  same as a loop, in each dtype, is compared here with torch's loop.
- which of torch's implementations is the default: ours has one, whatever ``foreach`` says.
- a step that needs a closure, and the types that it returns: LBFGS alone.
- inputs for ``step_sizes``, ``betas`` and other options that ``RMSprop`` has not.
- gradients with respect to ``weight_decay``: torch's ``RMSprop`` has none, and ours takes a number.
- optimizers under ``torch.compile``: ours is not traced; ``test_compile`` has what holds.
- two GPUs: a group of parameters on two devices is here with what this machine has.
- parameters with gaps in memory: refused, as a kernel runs over one block of memory.
- tensors of 2^32 elements: the kernels' own tests reach across 2^31 in an eighth of that memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product, zip_longest
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing import assert_close

from hogstream.optim import RMSprop
from torch_suite import (
    SHAPES,
    LeastSquares,
    Row,
    each_differentiable,
    each_info,
    each_of_torchs,
    each_row,
    filled,
    give_grads,
    params_in,
    params_of,
    rows,
)
from update_testing import BACKENDS


def test_the_tables_leave_the_process_as_it_was():
    assert not torch.backends.flags_frozen()
    assert "expecttest" not in sys.modules or find_spec("expecttest")
    hypothesis = pytest.importorskip("hypothesis")
    assert hypothesis.settings.default.deadline is None  # as conftest has it


# What a step does


def advance(scheduler: Any, loss: torch.Tensor) -> None:
    scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda weight: weight,
    "columns": lambda weight: weight.T.contiguous().T,
    "offset": lambda weight: torch.cat([weight[:1], weight])[1:],
}


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@each_row
def test_the_loss_goes_the_right_way(row, lay_out, scheduled):
    for make_schedulers in row.info.scheduler_inputs if scheduled else [[]]:
        problem = LeastSquares.made(row.device)
        problem.weight.data = lay_out(problem.weight.data)
        optimizer = row.make(problem.params)
        schedulers = [make(optimizer) for make in make_schedulers]
        before = problem.loss().item()
        for _ in range(20):
            loss = problem.backward()
            optimizer.step()
            for scheduler in schedulers:
                advance(scheduler, loss)
        after = problem.loss().item()
        assert after > before if row.ascends else after < before


@each_info
def test_gaps_in_the_memory_of_a_parameter_are_refused(info):
    with pytest.raises(ValueError, match="one block of memory"):
        info.optim_cls([Parameter(torch.zeros(10, 5, 2)[..., 0])])


def closeness(dtype: torch.dtype, steps: int) -> Any:
    """One rounding a step, of values about 1."""
    eps = torch.finfo(dtype).eps
    return {"rtol": steps * eps, "atol": steps * eps}


def runs() -> list[Any]:
    """Rows, backends for their devices, dtypes, and numbers of steps that there is time for."""
    found = []
    dtypes = [torch.float32, torch.float64]
    for on, backend_on, dtype in product(rows(torchs=True), BACKENDS, dtypes):
        (row,), (backend,) = on.values, backend_on.values
        interpreted = backend.name == "triton" and row.device == "cpu"
        if backend.device != row.device:
            continue
        if interpreted and (dtype == torch.float64 or row.info.optim_cls is not RMSprop):
            continue  # it takes a tenth of a second a step
        steps = 2 if interpreted else 100
        name = f"{on.id}-{backend_on.id}-{dtype}"
        marks = [*on.marks, *backend_on.marks]
        found.append(pytest.param(row, backend, dtype, steps, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("row", "backend", "dtype", "steps"), runs())
def test_many_steps_follow_torch(row, backend, dtype, steps):
    ours, theirs = (params_of(*SHAPES, device=row.device, dtype=dtype) for _ in range(2))
    optimizer, reference = row.make(ours, backend=backend.name), row.make_torchs(theirs)
    for step in range(steps):
        for params, each in ((ours, optimizer), (theirs, reference)):
            give_grads(params, step)
            each.step()
    assert_close(ours, theirs, **closeness(dtype, steps))
    # A few roundings of the first step's quotients, which are the largest, stay in buffers.
    assert_same_state(optimizer, reference, **closeness(dtype, max(steps, 16)))


def assert_same_state(optimizer: Any, reference: Any, **closeness: Any) -> None:
    """The same names of state and about the same values, whatever the dtype of either."""
    pairs = zip_longest(params_in(optimizer), params_in(reference))
    for ours, theirs in ((optimizer.state[a], reference.state[b]) for a, b in pairs):
        assert ours.keys() == theirs.keys()
        assert_close(ours, theirs, check_dtype=False, **closeness)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_of_torchs
def test_half_types_are_stepped_in_float32_and_rounded_once(row, dtype):
    # torch keeps their state in their own dtype: the reference is its RMSprop of float32.
    halves = params_of(*SHAPES, device=row.device, dtype=dtype)
    floats = [Parameter(param.detach().float()) for param in halves]
    optimizer, reference = row.make(halves), row.make_torchs(floats)
    for step in range(10):
        give_grads(halves, step)
        for half, single in zip(halves, floats, strict=True):
            assert half.grad is not None
            single.grad = half.grad.float()
        optimizer.step()
        reference.step()
        with torch.no_grad():
            for half, single in zip(halves, floats, strict=True):
                assert_close(half.float(), single, **closeness(dtype, 1))
                single.copy_(half)
    assert_same_state(optimizer, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.001), torch.tensor([0.001]), torch.tensor(0.001, dtype=torch.float64)]
)
@each_row
def test_a_tensor_is_as_good_a_learning_rate_as_its_number(row, lr):
    problems = [LeastSquares.made(row.device) for _ in range(2)]
    rates = [lr.clone(), lr.item()]
    for problem, each in zip(problems, rates, strict=True):
        kwargs = {**row.kwargs, "lr": each}
        problem.train(Row(row.info, row.device, kwargs).make(problem.params), steps=5)
    assert_close(problems[0].params, problems[1].params)


@each_row
def test_foreach_changes_nothing(row):
    problems = [LeastSquares.made(row.device) for _ in range(3)]
    for problem, foreach in zip(problems, [None, False, True], strict=True):
        problem.train(row.make(problem.params, foreach=foreach), steps=7)
    for problem in problems[1:]:
        assert_close(problem.params, problems[0].params, rtol=0, atol=0)


class Net(torch.nn.Module):
    """Two layers, and a scalar beside them that no loss reaches."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        self.scalar = Parameter(torch.zeros(()))
        self.to(device, dtype)
        with torch.no_grad():
            for seed, param in enumerate(self.parameters()):
                param.copy_(filled(param, seed))

    def forward(self, input: torch.Tensor) -> Any:
        return self.last(self.first(input).sigmoid()).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_of_torchs
def test_no_gradients_and_frozen_layers_are_passed_over_as_in_torch(row, dtype):
    nets = [Net(row.device, dtype) for _ in range(2)]
    input = torch.linspace(0.1, 0.6, 6, device=row.device, dtype=dtype).reshape(3, 2)
    optimizer, reference = row.make(nets[0].parameters()), row.make_torchs(nets[1].parameters())
    for step in range(7):
        for net, each in zip(nets, (optimizer, reference), strict=True):
            each.zero_grad()
            net.last.requires_grad_(step not in (3, 4))
            net.scalar.grad = torch.ones_like(net.scalar) if step % 2 else None
            if step != 2:
                net(input).sum().backward()
            each.step()
        assert_close(*(list(net.parameters()) for net in nets), **closeness(dtype, 8 * (step + 1)))
    assert_same_state(optimizer, reference, **closeness(dtype, 64))


@each_of_torchs
def test_dtypes_side_by_side(row):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    ours, theirs = (
        [
            Parameter(filled(torch.empty(2, 3, device=row.device, dtype=dtype), 1))
            for dtype in dtypes
        ]
        for _ in range(2)
    )
    optimizer, reference = row.make(ours), row.make_torchs(theirs)
    for step in range(7):
        for params, each in ((ours, optimizer), (theirs, reference)):
            give_grads(params, step)
            each.step()
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their, **closeness(our.dtype, 32))


@each_row
def test_a_complex_parameter_is_its_real_view(row):
    if row.kwargs.get("flat"):
        pytest.skip("flat memory is of real numbers, as the test below says")
    dtypes = [torch.complex64, torch.complex128, torch.float32]  # real ones beside them
    params = [
        param
        for dtype in dtypes
        for param in params_of((10, 5), (10,), (), device=row.device, dtype=dtype)
    ]
    reals = [Parameter(as_real(param).clone()) for param in params]
    optimizer, reference = row.make(params), row.make(reals)
    for step in range(3):
        give_grads(params, step)
        for param, real in zip(params, reals, strict=True):
            assert param.grad is not None
            real.grad = as_real(param.grad)
        optimizer.step()
        reference.step()
        for param, real in zip(params, reals, strict=True):
            assert_close(as_real(param), real, rtol=0, atol=0)


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@each_row
def test_a_complex_parameter_is_its_two_parts(row):
    if row.kwargs.get("flat"):
        pytest.skip("flat memory is of real numbers, as the test below says")
    (param,) = params_of((2,), device=row.device, dtype=torch.complex64)
    parts = [Parameter(part.detach().clone()) for part in (param.real, param.imag)]
    optimizers = row.make([param]), row.make(parts)
    for _ in range(3):
        for values, optimizer in zip((param, torch.complex(*parts)), optimizers, strict=True):
            optimizer.zero_grad()
            x, y = values
            ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs().backward()
            optimizer.step()
        assert_close([param.real, param.imag], [part.detach() for part in parts])


@each_info
def test_flat_memory_is_of_real_numbers(info):
    (param,) = params_of((3,), dtype=torch.complex64)
    address = param.data_ptr()
    with pytest.raises(ValueError, match=r"param 0 in group 0 must be real with flat=True"):
        info.optim_cls([param], flat=True)
    assert (param.data_ptr(), param.grad) == (address, None)


# What a step leaves alone


@each_differentiable
def test_a_step_without_gradients_changes_nothing(row):
    params = [filled(torch.empty(2, 3, device=row.device), seed) for seed in range(2)]
    before = [param.clone() for param in params]
    optimizer = row.make(params)
    assert optimizer.step(lambda: 1.5) == 1.5
    assert_close(params, before, rtol=0, atol=0)


@each_differentiable
def test_a_gradient_of_zero_changes_nothing_but_the_count(row):
    if row.kwargs.get("weight_decay"):
        pytest.skip("decays whatever the gradient is")
    (leaf,) = params_of((5, 1), device=row.device)
    param = leaf.clone() if row.kwargs.get("differentiable") else leaf
    optimizer = row.make([param])
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_close(param.detach(), params_of((5, 1), device=row.device)[0].detach(), rtol=0, atol=0)
    assert optimizer.state[param]["step"].item() == 1


@each_row
def test_empty_parameters_are_counted(row):
    params = params_of((0,), (3, 0), device=row.device)
    optimizer = row.make(params)
    give_grads(params, 0)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]


@each_row
def test_parameters_that_need_no_gradient_are_stepped_where_they_have_one(row):
    # As torch does, and its tests rely on: tensors that no graph has made.
    if row.kwargs.get("flat"):
        pytest.skip("flat memory is of what requires gradients")
    tensors = [param.detach() for param in params_of((2, 3), (4,), device=row.device)]
    params = params_of((2, 3), (4,), device=row.device)
    runs = (tensors, row.make(tensors)), (params, row.make(params))
    for step in range(3):
        for each, optimizer in runs:
            give_grads(each, step)
            optimizer.step()
    assert_close(tensors, [param.detach() for param in params], rtol=0, atol=0)


@each_row
def test_the_count_of_steps_is_a_float_on_the_host(row):
    problem = LeastSquares.made(row.device)
    optimizer = row.make(problem.params)
    problem.train(optimizer, steps=3)
    where = row.device if row.kwargs.get("capturable") else "cpu"
    for param in problem.params:
        step = optimizer.state[param]["step"]
        assert (step.item(), step.dtype, step.device.type) == (3, torch.float32, where)


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
@each_of_torchs
def test_the_default_dtype_makes_no_difference(row, default):
    problems = [LeastSquares.made(row.device) for _ in range(2)]
    problems[0].train(row.make(problems[0].params), steps=7)
    torch.set_default_dtype(default)
    try:
        problems[1].train(row.make(problems[1].params), steps=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(problems[0].params, problems[1].params)


# Memory


@each_row
def test_a_step_makes_no_tensors_on_the_device(row):
    if row.device != "cuda":
        pytest.skip("torch counts the memory of a GPU alone")
    problem = LeastSquares.made(row.device)
    optimizer = row.make(problem.params)
    problem.backward()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() == before
