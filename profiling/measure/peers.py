"""The optimizers that ``hogstream compare`` runs: ours, and those a user would pick instead."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hogstream.kernels.reference import plain_expression_
from hogstream.optim import RMSpropAsync
from hogstream.profiling.ceilings.passes import copy_pass, update_shaped_pass

Params = list[torch.Tensor]
Step = Callable[[], object]

HOGSTREAM = "hogstream"
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


@dataclass(frozen=True)
class Peer:
    """One optimizer.

    Attributes:
        name: As in ``--peers``.
        bytes_per_element: The least that a step must read and write, in float32.
        operations_per_element: Arithmetic of a step: each sum, product, quotient and root is one.
        build: Takes parameters that have gradients, and returns the call that does one step. Raises
            whatever says why it cannot run.
    """

    name: str
    bytes_per_element: int
    operations_per_element: int
    build: Callable[[Params], Step]

    @property
    def state_tensors(self) -> int:
        """How many tensors like a parameter it keeps: each is read and written, as is that."""
        return (self.bytes_per_element - 12) // 8


def _numpy_backend(params: Params) -> Step:
    return RMSpropAsync(params, LEARNING_RATE, backend="numpy").step


def _numpy_expression(params: Params) -> Step:
    if params[0].device.type != "cpu":
        raise CannotRunError("NumPy updates arrays on a CPU only")
    arrays = [
        (param.detach().numpy(), param.grad.numpy(), torch.zeros_like(param).numpy())
        for param in params
        if param.grad is not None
    ]

    def step() -> None:
        for param, grad, ms in arrays:
            plain_expression_(param, grad, ms, LEARNING_RATE)

    return step


def _torch_compile(params: Params) -> Step:
    if len(params) > MAX_COMPILED_TENSORS:
        raise CannotRunError(
            f"compiling a step of {len(params):,} tensors takes minutes: it is done up to "
            f"{MAX_COMPILED_TENSORS}"
        )
    torch.compiler.reset()  # else a second shape is compiled for any size, which is slower
    # It would warn that it leaves out the profiler's mark of a step.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    capturable = params[0].device.type == "cuda"  # keeps the step count where the kernel runs
    optimizer = torch.optim.RMSprop(params, LEARNING_RATE, foreach=True, capturable=capturable)
    return torch.compile(optimizer.step, dynamic=False)


def _bitsandbytes_rmsprop(params: Params) -> Step:
    from bitsandbytes.optim import RMSprop

    step: Step = RMSprop(params, LEARNING_RATE).step
    return step


def _optimi_adam(params: Params) -> Step:
    from optimi import Adam

    step: Step = Adam(params, LEARNING_RATE).step
    return step


def _pytorch_optimizer_laprop(params: Params) -> Step:
    from pytorch_optimizer import LaProp

    step: Step = LaProp(params, LEARNING_RATE).step
    return step


# Adam and LaProp keep a running mean of gradients beside that of squares: optimi and
# pytorch-optimizer have no RMSprop of their own, and these are what comes nearest.
PEERS = {
    peer.name: peer
    for peer in (
        Peer(HOGSTREAM, 20, 9, lambda params: RMSpropAsync(params, LEARNING_RATE).step),
        Peer(
            "hogstream-flat",
            20,
            9,
            lambda params: RMSpropAsync(params, LEARNING_RATE, flat=True).step,
        ),
        Peer("hogstream-numpy", 20, 9, _numpy_backend),
        Peer("numpy-expression", 20, 9, _numpy_expression),
        Peer(
            "torch-loop",
            20,
            9,
            lambda params: torch.optim.RMSprop(params, LEARNING_RATE, foreach=False).step,
        ),
        Peer(
            "torch-foreach",
            20,
            9,
            lambda params: torch.optim.RMSprop(params, LEARNING_RATE, foreach=True).step,
        ),
        Peer("torch-compile", 20, 9, _torch_compile),
        Peer(
            "torch-adagrad-fused",
            20,
            7,
            lambda params: torch.optim.Adagrad(params, LEARNING_RATE, fused=True).step,
        ),
        Peer(
            "torch-adam-fused",
            28,
            13,
            lambda params: torch.optim.Adam(params, LEARNING_RATE, fused=True).step,
        ),
        Peer("bitsandbytes-rmsprop", 20, 9, _bitsandbytes_rmsprop),
        Peer("optimi-adam", 28, 13, _optimi_adam),
        Peer("pytorch-opt-laprop", 28, 13, _pytorch_optimizer_laprop),
    )
}
#: What memory can do, on tensors of as many elements in one: each takes its turn as a peer does.
MEMORY = {
    peer.name: peer
    for peer in (
        Peer(COPY, 8, 0, lambda params: copy_pass(*_device_and_elements(params))),
        Peer(CEILING, 20, 2, lambda params: update_shaped_pass(*_device_and_elements(params))),
    )
}


def _device_and_elements(params: Params) -> tuple[torch.device, int]:
    return params[0].device, sum(param.numel() for param in params)
