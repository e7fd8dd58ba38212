"""One update of one large array: our backends against what one would write instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from hogstream.kernels import available_backends, rmsprop_
from hogstream.kernels.reference import plain_expression_
from hogstream.profiling.results.records import PositiveSpread
from hogstream.profiling.results.schema import KernelTime
from hogstream.profiling.turns import interleave

ELEMENTS = 1 << 24
_ROUNDS = 9
PLAIN_EXPRESSION = "NumPy expression"
TORCH_FOREACH = "torch RMSprop (foreach)"


def measure_kernels(device: torch.device, seed: int) -> list[KernelTime]:
    """Times one float32 update of 2^24 elements, with all cores, each alternative in turn.

    Args:
        device: The device to measure; the NumPy expression is measured on a CPU only.
        seed: Of the gradients.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    param, grad = (
        torch.randn(ELEMENTS, generator=generator, dtype=torch.float32, device="cpu")
        for _ in range(2)
    )
    alternatives = _alternatives(device, param, grad)
    timings = interleave({name: call for name, (call, _) in alternatives.items()}, device, _ROUNDS)
    expected = _after_two_updates(_update_plainly_, param, grad)
    results = []
    for name, (_, backend) in alternatives.items():
        milliseconds = PositiveSpread.of([1e3 * seconds for seconds in timings[name]])
        differing = None
        if backend is not None:
            ours = partial(rmsprop_, backend=backend)
            updated = _after_two_updates(ours, param.to(device), grad.to(device))
            differing = _differing_bits(updated, expected)
        results.append(
            KernelTime(
                name=name,
                elements=ELEMENTS,
                milliseconds=milliseconds,
                gigabytes_per_second=20e-6 * ELEMENTS / milliseconds.median,
                differing_bits=differing,
            )
        )
    return results


def _alternatives(
    device: torch.device, param: torch.Tensor, grad: torch.Tensor
) -> dict[str, tuple[Callable[[], object], str | None]]:
    """Name to a call that does one update, and the backend that it uses if it is ours."""

    def ours(backend: str) -> Callable[[], object]:
        p, g = param.to(device, copy=True), grad.to(device)
        ms = torch.zeros_like(p)
        return lambda: rmsprop_(p, g, ms, backend=backend)

    backends = ["triton"] if device.type == "cuda" else ["numba", "numpy"]
    alternatives: dict[str, tuple[Callable[[], object], str | None]] = {
        f"hogstream, {name}": (ours(name), name)
        for name in backends
        if available_backends()[name] is None
    }
    if device.type == "cpu":
        plain = param.clone(), grad, torch.zeros_like(param)
        alternatives[PLAIN_EXPRESSION] = (lambda: _update_plainly_(*plain), None)
    foreach = param.to(device, copy=True).requires_grad_()
    foreach.grad = grad.to(device)
    optimizer = torch.optim.RMSprop([foreach], foreach=True)
    alternatives[TORCH_FOREACH] = (optimizer.step, None)
    return alternatives


def _after_two_updates(
    update_: Callable[..., None], param: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    p, ms = param.clone(), torch.zeros_like(param)
    for _ in range(2):
        update_(p, grad, ms)
    return p.cpu(), ms.cpu()


def _update_plainly_(param: torch.Tensor, grad: torch.Tensor, ms: torch.Tensor) -> None:
    plain_expression_(param.numpy(), grad.numpy(), ms.numpy())


def _differing_bits(mine: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> int:
    return sum(
        _count_bits(a.view(torch.int32) ^ b.view(torch.int32))
        for a, b in zip(mine, theirs, strict=True)
    )


def _count_bits(integers: torch.Tensor) -> int:
    return int(np.unpackbits(integers[integers != 0].numpy().view(np.uint8)).sum())
