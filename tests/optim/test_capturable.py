"""``capturable=True``: learning rate and step count are on the device, and graphs replay."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from hogstream.optim import RMSpropAsync
from optim_testing import parameters, step_along
from triton_testing import DEVICE, MARKS
from update_testing import State, assert_same_bits

SHAPES = [(3, 5), (7,)]

pytestmark = MARKS
triton_launch = pytest.importorskip("hogstream.kernels.backends.triton_launch")


def on_device(*shapes: tuple[int, ...]) -> list[Parameter]:
    return [Parameter(param.detach().to(DEVICE)) for param in parameters(*shapes)]


def capturable(params: Any, **options: Any) -> RMSpropAsync:
    return RMSpropAsync(params, capturable=True, backend="triton", **options)


# lr as the host knows it is rounded as the one on the device is, and so is what follows from it.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 1 / 3, "weight_decay": 1 / 7},
    {"lr": 1 / 3, "weight_decay": 1 / 7, "decoupled_weight_decay": True},
    {"lr": 1 / 3, "eps_inside_sqrt": False, "maximize": True, "flat": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1]], ids=["table", "one"])
def test_gives_the_bits_of_an_lr_on_the_host(shapes, options):
    theirs, ours = on_device(*shapes), on_device(*shapes)
    host = RMSpropAsync(theirs, backend="triton", **options)
    device = capturable(ours, **options)
    step_along(host, first_seed=0, steps=3)
    step_along(device, first_seed=0, steps=3)
    for one, other in zip(ours, theirs, strict=True):
        states = [o.state[p] for o, p in ((device, one), (host, other))]
        assert_same_bits(
            State(one.detach().cpu(), states[0]["square_avg"].cpu()),
            State(other.detach().cpu(), states[1]["square_avg"].cpu()),
        )
        assert states[0]["step"].item() == 3
        assert states[0]["step"].device == one.device


def test_lr_is_changed_in_place_by_hand_and_by_a_scheduler():
    param = Parameter(torch.ones(3, device=DEVICE))
    optimizer = capturable([param], lr=0.5, alpha=0.0, eps=0.0)
    lr = optimizer.param_groups[0]["lr"]
    assert (lr.dtype, lr.shape, lr.device.type) == (torch.float64, (), DEVICE.type)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    param.grad = torch.ones(3, device=DEVICE)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    lr.fill_(2.0)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert param.tolist() == [1 - 0.5 - 0.25 - 2.0] * 3


def test_loading_a_state_fills_the_tensor_that_graphs_read():
    saved = capturable(on_device((3,)), lr=0.125).state_dict()
    optimizer = capturable(on_device((3,)), lr=0.5)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.125
    plain = RMSpropAsync(on_device((3,)), lr=0.75, backend="triton").state_dict()
    optimizer.load_state_dict(plain)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.75


def test_survives_pickling():
    optimizer = capturable(on_device((3,)), lr=0.125)
    twin = pickle.loads(pickle.dumps(optimizer))
    step_along(twin, first_seed=0)
    assert twin.capturable
    assert twin.state[twin.param_groups[0]["params"][0]]["step"].item() == 1


@pytest.mark.parametrize("lr", [0.1, torch.tensor(1), torch.ones(2, dtype=torch.float64)], ids=repr)
def test_refuses_another_lr_than_its_own(lr):
    param = Parameter(torch.ones(3, device=DEVICE))
    optimizer = capturable([param])
    optimizer.param_groups[0]["lr"] = lr
    param.grad = torch.ones(3, device=DEVICE)
    with pytest.raises(TypeError, match="lr of group 0 must stay the tensor"):
        optimizer.step()
    assert torch.all(param == 1)


def test_refuses_an_lr_on_another_device():
    param = Parameter(torch.ones(3, device=DEVICE))
    optimizer = capturable([param])
    optimizer.param_groups[0]["lr"] = torch.ones((), dtype=torch.float64, device="meta")
    param.grad = torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"lr of group 0 must stay on .*, got one on meta"):
        optimizer.step()
    assert torch.all(param == 1)


def test_alpha_may_be_a_tensor_that_changes_in_place():
    param = Parameter(torch.ones(3, device=DEVICE))
    optimizer = capturable([param], eps=1.0)
    alpha = optimizer.param_groups[0]["alpha"] = torch.tensor(0.0)
    param.grad = torch.ones(3, device=DEVICE)
    optimizer.step()
    alpha.fill_(0.75)
    param.grad.zero_()
    optimizer.step()
    assert optimizer.state[param]["square_avg"].tolist() == [0.75] * 3


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_refuses_backends_that_read_lr_on_the_host(backend):
    with pytest.raises(ValueError, match=f"needs the Triton backend, got {backend} for param 0"):
        RMSpropAsync([Parameter(torch.ones(1))], capturable=True, backend=backend)


def test_refuses_a_bad_lr_when_it_is_made():
    with pytest.raises(ValueError, match=r"lr must be a finite number >= 0, got -1\.0"):
        capturable(on_device((3,)), lr=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"flat": True}, {"weight_decay": 0.1}], ids=str)
def test_a_captured_step_replays_with_a_new_lr(options):
    theirs, ours = on_device(*SHAPES), on_device(*SHAPES)
    eager = RMSpropAsync(theirs, lr=0.5, **options)
    captured = capturable(ours, lr=0.5, **options)
    grads = [torch.randn(shape, device=DEVICE) for shape in SHAPES]

    def step(optimizer: RMSpropAsync, params: list[Parameter]) -> None:
        optimizer.zero_grad()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * 2 if param.grad is None else param.grad.add_(grad, alpha=2)
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured, ours)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, ours)
    step(eager, theirs)

    for lr in (0.5, 0.125, 0.0625):
        captured.param_groups[0]["lr"].fill_(lr)
        eager.param_groups[0]["lr"] = lr
        for grad in grads:
            grad.normal_()
        graph.replay()
        step(eager, theirs)
        # An eager step in between must not disturb what the graph reads.
        step(captured, ours)
        step(eager, theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert captured.state[one]["step"].item() == eager.state[other]["step"].item() == 7


def launches_of(optimizer: RMSpropAsync) -> int:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)  # at another address than the one before, maybe
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if "rmsprop" in event.key)


@pytest.mark.gpu
def test_a_thousand_tensors_are_one_launch_and_new_numbers_compile_nothing():
    params = [Parameter(torch.randn(1000, device="cuda")) for _ in range(1000)]
    optimizer = RMSpropAsync(params)
    launches_of(optimizer)
    compiled = dict(triton_launch._compiled)
    for number in (0.0, 0.1, 0.5):
        optimizer.param_groups[0].update(lr=number, alpha=number, eps=16 * number)
        assert launches_of(optimizer) == 1
    assert triton_launch._compiled == compiled
