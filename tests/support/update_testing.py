"""What the tests of the update share: backends, variants, operands, the formula and its bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch

import triton_testing
from hogstream.kernels import available_backends, multi_tensor_rmsprop_, rmsprop_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import Operands
from hogstream.kernels.race_counters import LANDED, SURVIVED, RaceCounters


class State(NamedTuple):
    """What an update changes.

    Attributes:
        param: The parameter.
        ms: Its mean square.
        grad_avg: Its mean gradient, if the update is centered.
        momentum_buffer: It, if there is momentum.
    """

    param: torch.Tensor
    ms: torch.Tensor
    grad_avg: torch.Tensor | None = None
    momentum_buffer: torch.Tensor | None = None

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor | None]) -> State:
        """Of its tensors in their order, of which the first two are there."""
        param, ms, *more = tensors
        assert param is not None
        assert ms is not None
        return cls(param, ms, *more)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """What a function makes of each tensor that there is."""
        return State.of(each if each is None else function(each) for each in self)

    def needed(self, options: Mapping[str, Any]) -> State:
        """Without what an update with such options has none of."""
        return self._replace(
            grad_avg=self.grad_avg if options.get("centered") else None,
            momentum_buffer=self.momentum_buffer if options.get("momentum") else None,
        )


@dataclass(frozen=True)
class Backend:
    """A backend and the device that it is tested on: interpreted Triton runs on the CPU."""

    name: str
    device: str

    def update(self, state: State, grad: torch.Tensor, **options: Any) -> State:
        """The state after one update of a copy of it, on the CPU."""
        updated = state.map(lambda tensor: tensor.to(self.device, copy=True))
        update_(updated, grad.to(self.device), backend=self.name, **options)
        return updated.map(torch.Tensor.cpu)


def update_(state: State, grad: torch.Tensor, **options: Any) -> None:
    """Calls ``rmsprop_`` with the tensors of a state."""
    param, ms, grad_avg, buffer = state
    rmsprop_(param, grad, ms, grad_avg=grad_avg, momentum_buffer=buffer, **options)


def update_list_(states: Sequence[State], grads: list[torch.Tensor], **options: Any) -> None:
    """Calls ``multi_tensor_rmsprop_`` with the tensors of states, which are of the same kinds."""
    columns: list[Any] = [
        None if column[0] is None else list(column) for column in zip(*states, strict=True)
    ]
    params, mss, grad_avgs, buffers = columns
    multi_tensor_rmsprop_(
        params, grads, mss, grad_avgs=grad_avgs, momentum_buffers=buffers, **options
    )


def _on_cpu(name: str) -> Any:
    missing = available_backends()[name]
    skip = pytest.mark.skipif(missing is not None, reason=str(missing))
    return pytest.param(Backend(name, "cpu"), id=name, marks=skip)


CPU_BACKENDS = [_on_cpu("numpy"), _on_cpu("numba")]
BACKENDS = [
    *CPU_BACKENDS,
    pytest.param(
        Backend("triton", triton_testing.DEVICE.type), id="triton", marks=triton_testing.MARKS
    ),
]

#: Parameter dtype to compute type, as the design has it.
COMPUTE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
#: What ``several_threads`` gives torch.
THREADS = 3
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in COMPUTE]

_DENOMINATORS: dict[str, dict[str, Any]] = {
    "inside": {},
    "outside": {"eps_inside_sqrt": False},
}
_DECAYS: dict[str, dict[str, Any]] = {
    "undecayed": {},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}
_DIRECTIONS: dict[str, dict[str, Any]] = {"minimize": {}, "maximize": {"maximize": True}}
_CENTERS: dict[str, dict[str, Any]] = {"uncentered": {}, "centered": {"centered": True}}
_MOMENTA: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "lr-in-momentum": {"momentum": 0.9, "lr_in_momentum": True},
}
_CHOICES = (_DENOMINATORS, _DECAYS, _DIRECTIONS, _CENTERS, _MOMENTA)

#: Every combination of the switches, as keyword arguments of ``rmsprop_``.
ALL_VARIANTS = [
    pytest.param(
        {name: value for choice in chosen for name, value in choice[1].items()},
        id="-".join(word for word, _ in chosen),
    )
    for chosen in product(*(choices.items() for choices in _CHOICES))
]
#: Some of them, in which any two switches have every combination.
VARIANTS = ALL_VARIANTS[::5]
#: An update that has all of the state.
FULL: dict[str, Any] = {"centered": True, "momentum": 0.9}


def fresh_state(param: torch.Tensor, **options: Any) -> State:
    """A parameter that has had no update yet, of such options."""
    zeros = (torch.zeros_like(param, dtype=COMPUTE[param.dtype]) for _ in range(3))
    return State(param, *zeros).needed(options)


def worn_state(size: int, dtype: torch.dtype, seed: int, **options: Any) -> State:
    """A parameter that has had many updates, of such options: ordinary values, in shape (size,)."""
    param, ms, grad_avg, buffer = (normal(size, torch.float64, seed + i) for i in range(4))
    state = (each.to(COMPUTE[dtype]) for each in (ms.square(), 0.3 * grad_avg, buffer))
    return State(param.to(dtype), *state).needed(options)


def normal(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Standard normal values, in shape (size,)."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size)).to(dtype)


def extreme(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of either sign from 1e-20 to 1e10, as far as the dtype reaches, in shape (size,)."""
    limits = torch.finfo(dtype)
    rng = np.random.default_rng(seed)
    low, high = max(1e-20, limits.smallest_normal), min(1e10, limits.max)
    values = rng.choice([-1.0, 1.0], size) * 10 ** rng.uniform(np.log10(low), np.log10(high), size)
    return torch.from_numpy(values).to(dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def special(dtype: torch.dtype) -> torch.Tensor:
    """Where arithmetic goes wrong: zeros, denormals, limits, infinities and NaN."""
    limits = torch.finfo(dtype)
    denormal = limits.smallest_normal * limits.eps
    values = [0.0, denormal, 3 * denormal, limits.smallest_normal, 1.0, limits.max, np.inf, np.nan]
    signed = torch.tensor([*values, *(-value for value in values)], dtype=dtype)
    all_ones = torch.tensor([-1], dtype=_BITS[dtype.itemsize]).view(dtype)  # another NaN
    return torch.cat([signed, all_ones])


def special_operands(
    dtype: torch.dtype, grad_dtype: torch.dtype | None = None, **options: Any
) -> tuple[State, torch.Tensor]:
    """A state and a gradient of special values, of which any three operands have all combinations.

    There are 17, a prime: so two polynomials of degree 2 over them agree in two places at most.
    """
    narrow, of_grad, wide = map(special, (dtype, grad_dtype or dtype, COMPUTE[dtype]))
    count = len(narrow)
    of_0, of_1, of_2 = torch.cartesian_prod(*[torch.arange(count)] * 3).T
    param, grad, *state = (
        values[(of_0 + of_1 * x + of_2 * x * x) % count]
        for x, values in enumerate((narrow, of_grad, wide, wide, wide))
    )
    return State(param, *state).needed(options), grad


def formula(
    state: State,
    grad: torch.Tensor,
    *,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    lr_in_momentum: bool = False,
    eps_inside_sqrt: bool = True,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> State:
    """The design's formula in plain NumPy, an operation at a time; torch converts the dtypes."""
    compute = COMPUTE[state.param.dtype]
    p, g = (tensor.to(compute).numpy() for tensor in (state.param, grad))
    arrays: list[Any] = [each if each is None else each.numpy() for each in state[1:]]
    ms, ga, buf = arrays
    with np.errstate(all="ignore"):
        if maximize:
            g = -g
        if weight_decay and decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p
        ms = alpha * ms + ((1 - alpha) * g) * g
        v = ms
        if centered:
            ga = alpha * ga + (1 - alpha) * g
            v = ms - ga * ga
            v = np.where(v < 0, np.zeros_like(v), v)
        d = np.sqrt(v + eps) if eps_inside_sqrt else np.sqrt(v) + eps
        if not momentum:
            p = p - (lr * g) / d
        elif lr_in_momentum:
            buf = momentum * buf + (lr * g) / d
            p = p - buf
        else:
            buf = momentum * buf + g / d
            p = p - lr * buf
    new = (each if each is None else torch.from_numpy(each) for each in (ms, ga, buf))
    return State.of([torch.from_numpy(p).to(state.param.dtype), *new])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A float tensor's bits as integers, the same for every NaN."""
    canonical = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return canonical.view(_BITS[tensor.element_size()])


Tensors = TypeVar("Tensors", State, Operands)


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    """Every element is equal to the bit, the sign of zeros included; any NaN equals any other."""
    for name, got, want in zip(expected._fields, actual, expected, strict=True):
        assert (got is None) == (want is None), f"{name}: {got} instead of {want}"
        if got is None or want is None:
            continue
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        differ = (bits(got) != bits(want)).nonzero()
        assert not len(differ), (
            f"{len(differ)} elements of {name} differ, first at {differ[0].tolist()}: "
            f"{_exactly(got[tuple(differ[0])])} instead of {_exactly(want[tuple(differ[0])])}"
        )


def _exactly(element: torch.Tensor) -> str:
    """An element as numbers that differ in a bit differ too."""
    return float(element).hex()


#: An update of a float64 parameter whose bits are a small count, by a gradient of -1: the count
#: becomes greater by 2, which are two of the least numbers that there are.
ADDS_2_TO_A_COUNT = Hyperparameters(lr=1e-323, alpha=0.0, eps=0.0)

#: The row of its counters that a parameter lies in, and all their counts after that update.
ALIASED = [
    pytest.param(LANDED, [10, 5, 3], id="two others landed meanwhile"),
    pytest.param(SURVIVED, [8, 5, 1], id="two others survived until now"),
]


def aliased(counters: RaceCounters, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A parameter of one element that lies among its own counters, its gradient and ``ms``.

    So an update that writes it does to its counts what others would do that end meanwhile.
    """
    device = counters.counts.device
    counters.counts.copy_(torch.tensor([[7], [4], [1]]))
    grad, ms = (torch.full((1,), value, device=device).double() for value in (-1.0, 0.0))
    return counters.counts[row].view(torch.float64), grad, ms
