"""``torch.compile`` around a training step, or a part of one, changes nothing of what it does."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Linear, ReLU, Sequential
from torch.optim.lr_scheduler import ExponentialLR

from hogstream.optim import RMSprop, RMSpropAsync

dynamo = pytest.importorskip("torch._dynamo")
pytestmark = pytest.mark.slow

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Step = Callable[[torch.Tensor], object]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that it leaves out its own profiler's marks
        yield
    dynamo.reset()


class Training:
    """A small model, with an optimizer of all its parameters."""

    def __init__(self, make: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.make = make
        self.model = Sequential(Linear(8, 8), ReLU(), Linear(8, 1)).to(dtype)
        self.optimizer = make(self.model.parameters())

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(x).square().mean()
        return loss

    def flat_params(self) -> torch.Tensor:
        return torch.cat([param.detach().flatten() for param in self.model.parameters()])


# Ways to compile a training step: each gives one, of which ``compiled`` has compiled something.


def whole(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> torch.Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(x)
        loss.backward()
        training.optimizer.step()
        return loss.detach()

    return compiled(step)


def whole_with_zeros(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad(set_to_none=False)
        training.loss(x).backward()
        training.optimizer.step()

    return compiled(step)


def twice(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        training.optimizer.step()
        training.optimizer.step()

    return compiled(step)


def in_a_loop(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> float:
        for half in x.chunk(2):
            training.optimizer.zero_grad()
            loss = training.loss(half)
            loss.backward()
            training.optimizer.step()
        return loss.item()

    return compiled(step)


def of_arguments(training: Training, compiled: Compile) -> Step:
    def step(model: Any, optimizer: Any, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return partial(compiled(step), training.model, training.optimizer)


def a_method(training: Training, compiled: Compile) -> Step:
    class Trainer:
        steps = 0

        def step(self, x: torch.Tensor) -> None:
            training.optimizer.zero_grad()
            training.loss(x).backward()
            training.optimizer.step()
            self.steps += 1

    return compiled(Trainer().step)


def model_alone(training: Training, compiled: Compile) -> Step:
    model = compiled(training.model)

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        model(x).square().mean().backward()
        training.optimizer.step()

    return step


def step_alone(training: Training, compiled: Compile) -> Step:
    update = compiled(training.optimizer.step)

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        update()

    return step


def step_without_grad(training: Training, compiled: Compile) -> Step:
    @compiled
    @torch.no_grad()
    def update() -> None:
        training.optimizer.step()

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        update()

    return step


def zero_grad_and_loss(training: Training, compiled: Compile) -> Step:
    zero_grad, loss = compiled(training.optimizer.zero_grad), compiled(training.loss)

    def step(x: torch.Tensor) -> None:
        zero_grad()
        loss(x).backward()
        training.optimizer.step()

    return step


def nested(training: Training, compiled: Compile) -> Step:
    loss, update = compiled(training.loss), compiled(lambda: training.optimizer.step())

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        loss(x).backward()
        update()

    return compiled(step)


def with_closure(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> Any:
        def closure() -> float:
            training.optimizer.zero_grad()
            loss = training.loss(x)
            loss.backward()
            return loss.item()

        return training.optimizer.step(closure)

    return compiled(step)


def closure_alone(training: Training, compiled: Compile) -> Step:
    @compiled
    def closure(x: torch.Tensor) -> torch.Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(x)
        loss.backward()
        return loss

    return lambda x: training.optimizer.step(lambda: closure(x))


def with_scheduler(training: Training, compiled: Compile) -> Step:
    scheduler = ExponentialLR(training.optimizer, gamma=0.5)

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        training.optimizer.step()
        scheduler.step()

    return compiled(step)


def with_lr_by_hand(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        for group in training.optimizer.param_groups:
            group["lr"] *= 0.9
        training.optimizer.step()

    return compiled(step)


def with_autocast(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = training.loss(x)
        loss.backward()
        training.optimizer.step()

    return compiled(step)


def with_scaler(training: Training, compiled: Compile) -> Step:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        scaler.scale(training.loss(x)).backward()
        scaler.step(training.optimizer)
        scaler.update()

    return compiled(step)


def with_clipping(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 0.1)
        training.optimizer.step()

    return compiled(step)


def with_hooks(training: Training, compiled: Compile) -> Step:
    calls: list[str] = []
    training.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    training.optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        training.optimizer.step()

    run = compiled(step)

    def counted(x: torch.Tensor) -> None:
        run(x)
        assert calls == ["before", "after"]
        calls.clear()

    return counted


def assigned_gradients(training: Training, compiled: Compile) -> Step:
    params = list(training.model.parameters())

    def step(x: torch.Tensor) -> None:
        gradients = torch.autograd.grad(training.loss(x), params)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient * 0.5
        training.optimizer.step()

    return compiled(step)


def parameters_read_after(training: Training, compiled: Compile) -> Step:
    means = [param.detach().clone() for param in training.model.parameters()]

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        training.optimizer.step()
        with torch.no_grad():
            for param, mean in zip(training.model.parameters(), means, strict=True):
                mean.lerp_(param, 0.5)
                param.copy_(mean)

    return compiled(step)


def several_optimizers(training: Training, compiled: Compile) -> Step:
    layers = training.model[0], training.model[2]
    optimizers = [training.make(layer.parameters(), weight_decay=0.1) for layer in layers]

    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        optimizers[0].step()
        optimizers[1].step()

    return compiled(step)


def several_groups(training: Training, compiled: Compile) -> Step:
    first, last = training.model[0].parameters(), training.model[2].parameters()
    optimizer = training.make([{"params": first, "lr": 0.02}, {"params": last, "alpha": 0.9}])

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        training.loss(x).backward()
        optimizer.step()

    return compiled(step)


def after_each_backward(training: Training, compiled: Compile) -> Step:
    params = training.model.parameters()
    optimizers: dict[torch.Tensor, Any] = {param: training.make([param]) for param in params}

    def update(param: torch.Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(update)

    def step(x: torch.Tensor) -> None:
        training.loss(x).backward()

    return compiled(step)


def made_inside(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> None:
        optimizer = training.make(training.model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            training.loss(x).backward()
            optimizer.step()

    return compiled(step)


def copied_and_loaded_inside(training: Training, compiled: Compile) -> Step:
    def step(x: torch.Tensor) -> None:
        training.optimizer.zero_grad()
        training.loss(x).backward()
        training.optimizer.step()
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer).state_dict())

    return compiled(step)


def group_added_inside(training: Training, compiled: Compile) -> Step:
    optimizer = training.make(training.model[0].parameters())

    def step(x: torch.Tensor) -> None:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": list(training.model[2].parameters()), "lr": 0.02})
        optimizer.zero_grad()
        training.loss(x).backward()
        optimizer.step()

    return compiled(step)


def frozen_and_not(training: Training, compiled: Compile) -> Step:
    run, frozen = whole(training, compiled), training.model[0]

    def step(x: torch.Tensor) -> None:
        frozen.requires_grad_(not frozen.weight.requires_grad)
        run(x)

    return step


WAYS = [
    *(whole, whole_with_zeros, twice, in_a_loop, of_arguments, a_method, model_alone),
    *(step_alone, step_without_grad, zero_grad_and_loss, nested, with_closure, closure_alone),
    *(with_scheduler, with_lr_by_hand, with_autocast, with_scaler, with_clipping, with_hooks),
    *(assigned_gradients, parameters_read_after, several_optimizers, several_groups),
    *(after_each_backward, made_inside, copied_and_loaded_inside, group_added_inside),
    frozen_and_not,
]


def unwrapped(levels: int) -> Callable[[Training, Compile], Step]:
    """As torch's own tests compile a step: what is inside its wrappers, without gradients."""

    def step_of(training: Training, compiled: Compile) -> Step:
        update = training.optimizer.step
        for _ in range(levels):
            update = update.__wrapped__
        run = compiled(lambda: update(training.optimizer))

        def step(x: torch.Tensor) -> None:
            training.optimizer.zero_grad()
            training.loss(x).backward()
            with torch.no_grad():
                run()

        return step

    return step_of


def eager(function: Any) -> Any:
    return function


def compiled_by(**options: Any) -> Compile:
    return partial(torch.compile, **options)


def train(
    way: Callable[[Training, Compile], Step],
    compiled: Compile,
    make: Any,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    training = Training(make, dtype)
    step = way(training, compiled)
    for index in range(6):
        x = torch.randn(16 - 2 * (index % 3), 8, generator=torch.Generator().manual_seed(index))
        step(x.to(dtype))
    return training.flat_params()


def assert_right(way: Any, compiled: Compile, **options: Any) -> None:
    """The bits of the eager step; and that makes what torch's optimizer makes.

    The latter in float64: in float32 a few steps make more of the two's rounding on some CPUs.
    """
    make = partial(RMSprop, **options)
    assert torch.equal(train(way, compiled, make), train(way, eager, make))
    of_torch = {name: each for name, each in options.items() if name not in ("flat", "backend")}
    mine = train(way, eager, make, torch.float64)
    theirs = train(way, eager, partial(torch.optim.RMSprop, **of_torch), torch.float64)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_without_it(way):
    assert_right(way, compiled_by(backend="eager"))  # others take the same graphs, and longer


@pytest.mark.parametrize("way", [whole, with_closure, frozen_and_not])
def test_trains_as_without_it_with_dynamic_shapes(way):
    assert_right(way, compiled_by(backend="aot_eager", dynamic=True))


MOMENTUM = {"momentum": 0.9, "centered": True, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("way", "made"),
    [(whole, MOMENTUM), (whole, {"flat": True}), (step_alone, MOMENTUM), (made_inside, MOMENTUM)],
    ids=["momentum", "flat", "step alone", "made inside"],
)
def test_trains_as_without_it_with_options(way, made):
    assert_right(way, compiled_by(backend="aot_eager"), **made)


def test_trains_under_inductor():
    # Whose forward and backward round otherwise, and which builds a header first: seconds.
    made = partial(RMSprop, momentum=0.9)
    compiled = compiled_by(mode="reduce-overhead", dynamic=True)
    result, expected = train(whole, compiled, made), train(whole, eager, made)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("made", [{}, MOMENTUM, {"flat": True}, {"backend": "numpy"}], ids=str)
def test_step_within_a_graph(made, backend):
    assert_right(unwrapped(2), compiled_by(backend=backend, fullgraph=True), **made)


@pytest.mark.parametrize("levels", [1, 2])
def test_step_without_wrappers(levels):
    assert_right(unwrapped(levels), compiled_by(backend="aot_eager"))


def test_step_within_a_graph_of_inductor():
    assert_right(unwrapped(2), compiled_by(fullgraph=True), momentum=0.9)


def test_step_within_a_graph_counts_and_reads_a_tensor_of_lr():
    training = Training(partial(RMSprop, lr=torch.tensor(0.5)))
    step = unwrapped(2)(training, compiled_by(backend="aot_eager", fullgraph=True))
    for _ in range(3):
        step(torch.ones(4, 8))
    training.optimizer.param_groups[0]["lr"].fill_(0.0)
    before = training.flat_params()
    with dynamo.config.patch(error_on_recompile=True):
        step(torch.ones(4, 8))
    assert torch.equal(training.flat_params(), before)
    assert {state["step"].item() for state in training.optimizer.state.values()} == {4.0}


def test_step_within_a_graph_refuses_what_it_cannot_do():
    training = Training(partial(RMSprop, differentiable=True))
    training.loss(torch.ones(4, 8)).backward()
    before = training.flat_params()
    with pytest.raises(NotImplementedError, match="has no step for graphs"):
        training.optimizer.step.__wrapped__(training.optimizer)
    assert torch.equal(training.flat_params(), before)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("schedule", [False, True], ids=["by_hand", "scheduler"])
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("way", [whole, step_alone, zero_grad_and_loss, with_closure])
def test_compiles_once(way, flat, schedule):
    def trained(compiled: Compile) -> torch.Tensor:
        training = Training(partial(RMSpropAsync, flat=flat))
        optimizer = training.optimizer
        scheduler = ExponentialLR(optimizer, gamma=0.5) if schedule else None
        seen: list[float] = []
        optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        step = way(training, compiled)
        for index in range(6):
            if scheduler is not None:
                scheduler.step()
            elif index == 3:
                optimizer.param_groups[0]["lr"] = 0.001
            # Once for the first step, which has no gradients yet, and once for those that follow.
            with dynamo.config.patch(error_on_recompile=index > 2):
                step(torch.ones(16, 8))
        assert len(seen) == 6
        return training.flat_params()

    assert torch.equal(trained(compiled_by(backend="eager")), trained(eager))


def test_importing_the_optimizer_imports_no_compiler():
    code = (
        "import sys, hogstream.optim\n"
        "found = {'torch._dynamo', 'torch._inductor', 'numba', 'triton'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
