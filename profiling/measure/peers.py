"""What ``hogstream compare`` runs: our optimizer, those a user would pick instead, and memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.optim import Adagrad, Adam, RMSprop

from hogstream.kernels.reference import plain_expression_
from hogstream.optim import RMSprop as OurRMSprop
from hogstream.optim import RMSpropAsync
from hogstream.profiling.ceilings.passes import copy_pass, update_shaped_passes

Params = list[torch.Tensor]

HOGSTREAM, HOGSTREAM_FLAT = "hogstream", "hogstream-flat"
TORCH_RMSPROP = TORCH_LOOP, TORCH_FOREACH = "torch-loop", "torch-foreach"
COPY = "memory-copy"
CEILING = "memory-ceiling"
LEARNING_RATE = 1e-3
#: Modules of peers that hogstream does not require, and what to install for them.
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "optimi": "torch-optimi",
    "pytorch_optimizer": "pytorch-optimizer",
}
# On a CPU 161 tensors take about 40 s to compile, and the time grows with their number.
MAX_COMPILED_TENSORS = 200


class CannotRunError(Exception):
    """A peer cannot take these parameters; the message says why."""


def reason(error: Exception) -> str:
    """Why a peer did not run, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return f"{error.name} is not installed; pip install {PACKAGES[error.name]}"
    text = str(error) if isinstance(error, CannotRunError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


class Optimizer(Protocol):
    """What a training loop calls."""

    def zero_grad(self) -> object:
        """Before a forward and backward."""

    def step(self) -> object:
        """After them."""


@dataclass(frozen=True)
class Work:
    """What takes turns.

    Attributes:
        name: As in ``--peers``, or of what memory can do.
        bytes_per_element: The least that a step must read and write, in float32.
        operations_per_element: Arithmetic of a step: each sum, product, quotient and root is one.
    """

    name: str
    bytes_per_element: int
    operations_per_element: int


@dataclass(frozen=True)
class Peer(Work):
    """One optimizer.

    Attributes:
        build: Makes it for some parameters. Raises whatever says why it cannot run.
    """

    build: Callable[[Params], Optimizer]

    @property
    def state_tensors(self) -> int:
        """How many tensors like a parameter it keeps: each is read and written, as is that."""
        return (self.bytes_per_element - 12) // 8


@dataclass(frozen=True)
class MemoryPass(Work):
    """What memory can do.

    Attributes:
        build: Takes a device and a number of float32 elements. Makes the ways to go over them, of
            which the fastest counts.
    """

    build: Callable[[torch.device, int], Sequence[Callable[[], object]]]


class _NumPyExpression:
    """The update as one would write it down in NumPy."""

    def __init__(self, params: Params) -> None:
        if params[0].device.type != "cpu":
            raise CannotRunError("NumPy updates arrays on a CPU only")
        self._params = params
        self._arrays = [
            (param.detach().numpy(), torch.zeros_like(param).numpy()) for param in params
        ]

    def zero_grad(self) -> None:
        for param in self._params:
            param.grad = None

    def step(self) -> None:
        for param, (array, ms) in zip(self._params, self._arrays, strict=True):
            if param.grad is not None:
                plain_expression_(array, param.grad.numpy(), ms, LEARNING_RATE)


@dataclass(frozen=True)
class _Compiled:
    """An optimizer whose step is compiled."""

    zero_grad: Callable[[], object]
    step: Callable[[], object]


def _torch_compile(params: Params) -> Optimizer:
    if len(params) > MAX_COMPILED_TENSORS:
        raise CannotRunError(
            f"compiling a step of {len(params):,} tensors takes minutes: it is done up to "
            f"{MAX_COMPILED_TENSORS}"
        )
    torch.compiler.reset()  # else a second shape is compiled for any size, which is slower
    # It would warn that it leaves out the profiler's mark of a step.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    capturable = params[0].device.type == "cuda"  # keeps the step count where the kernel runs
    optimizer = RMSprop(params, LEARNING_RATE, foreach=True, capturable=capturable)
    return _Compiled(optimizer.zero_grad, torch.compile(optimizer.step, dynamic=False))


def _bitsandbytes_rmsprop(params: Params) -> Optimizer:
    from bitsandbytes import optim

    optimizer: Optimizer = optim.RMSprop(params, LEARNING_RATE)
    return optimizer


def _optimi_adam(params: Params) -> Optimizer:
    import optimi

    optimizer: Optimizer = optimi.Adam(params, LEARNING_RATE)
    return optimizer


def _pytorch_optimizer_laprop(params: Params) -> Optimizer:
    from pytorch_optimizer import LaProp

    optimizer: Optimizer = LaProp(params, LEARNING_RATE)
    return optimizer


# What both RMSprops may be asked for: each kind of state is read and written, 8 bytes an element.
_OPTIONS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "momentum": (28, 11, {"momentum": 0.9}),
    "centered": (28, 15, {"centered": True}),
    "momentum-centered": (36, 17, {"momentum": 0.9, "centered": True}),
}


def _with_options() -> Iterator[Peer]:
    for name, (size, operations, options) in _OPTIONS.items():
        ours = partial(OurRMSprop, lr=LEARNING_RATE, **options)
        theirs = partial(RMSprop, lr=LEARNING_RATE, foreach=True, **options)
        yield Peer(f"{HOGSTREAM}-{name}", size, operations, ours)
        yield Peer(f"{TORCH_FOREACH}-{name}", size, operations, theirs)


# Adam and LaProp keep a running mean of gradients beside that of squares: optimi and
# pytorch-optimizer have no RMSprop of their own, and these are what comes nearest.
PEERS = {
    peer.name: peer
    for peer in (
        Peer(HOGSTREAM, 20, 9, partial(RMSpropAsync, lr=LEARNING_RATE)),
        Peer(HOGSTREAM_FLAT, 20, 9, partial(RMSpropAsync, lr=LEARNING_RATE, flat=True)),
        Peer("hogstream-numpy", 20, 9, partial(RMSpropAsync, lr=LEARNING_RATE, backend="numpy")),
        Peer("numpy-expression", 20, 9, _NumPyExpression),
        Peer(TORCH_LOOP, 20, 9, partial(RMSprop, lr=LEARNING_RATE, foreach=False)),
        Peer(TORCH_FOREACH, 20, 9, partial(RMSprop, lr=LEARNING_RATE, foreach=True)),
        Peer("torch-compile", 20, 9, _torch_compile),
        Peer("torch-adagrad-fused", 20, 7, partial(Adagrad, lr=LEARNING_RATE, fused=True)),
        Peer("torch-adam-fused", 28, 13, partial(Adam, lr=LEARNING_RATE, fused=True)),
        Peer("bitsandbytes-rmsprop", 20, 9, _bitsandbytes_rmsprop),
        Peer("optimi-adam", 28, 13, _optimi_adam),
        Peer("pytorch-opt-laprop", 28, 13, _pytorch_optimizer_laprop),
        *_with_options(),
    )
}
#: Those that are measured unless others are named: all but those with options.
DEFAULT_PEERS = tuple(name for name in PEERS if not name.endswith(tuple(_OPTIONS)))
#: What memory can do, on as many elements in one tensor.
MEMORY = {
    each.name: each
    for each in (
        MemoryPass(COPY, 8, 0, lambda *where: [copy_pass(*where)]),
        MemoryPass(CEILING, 20, 2, update_shaped_passes),
    )
}
