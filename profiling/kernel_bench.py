"""One update of one large array: our backends against what one would write instead."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hogstream.kernels import available_backends, rmsprop_
from hogstream.kernels.reference import plain_expression_
from hogstream.profiling.ceilings import REPEATS, interleave

ELEMENTS = 1 << 24
PLAIN_EXPRESSION = "NumPy expression"
TORCH_FOREACH = "torch RMSprop (foreach)"


def measure_kernels(device: torch.device, seed: int) -> list[dict[str, Any]]:
    """Times one float32 update of 2^24 elements, with all cores, each alternative in turn.

    Args:
        device: The device to measure; the NumPy expression is measured on a CPU only.
        seed: Of the gradients.

    Returns:
        For each alternative ``name``, ``elements``, median ``milliseconds``,
        ``gigabytes_per_second`` (20 bytes an element), and ``differing_bits``: how many bits of
        parameter and ``ms`` differ from the NumPy expression's after two updates (null where that
        is not what is computed).
    """
    generator = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(ELEMENTS, generator=generator) for _ in range(2))
    alternatives = _alternatives(device, param, grad)
    timings = interleave({name: call for name, (call, _) in alternatives.items()}, device, REPEATS)
    expected = _after_two_updates(plain_expression_, param, grad)
    results = []
    for name, (_, backend) in alternatives.items():
        seconds = statistics.median(timings[name])
        results.append(
            {
                "name": name,
                "elements": ELEMENTS,
                "milliseconds": seconds * 1e3,
                "gigabytes_per_second": 20e-9 * ELEMENTS / seconds,
                "differing_bits": _differing(backend, device, param, grad, expected)
                if backend
                else None,
            }
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
        arrays = param.clone().numpy(), grad.numpy(), torch.zeros_like(param).numpy()
        alternatives[PLAIN_EXPRESSION] = (lambda: plain_expression_(*arrays), None)
    foreach = param.to(device, copy=True).requires_grad_()
    foreach.grad = grad.to(device)
    optimizer = torch.optim.RMSprop([foreach], foreach=True)
    alternatives[TORCH_FOREACH] = (optimizer.step, None)
    return alternatives


def _after_two_updates(
    update_: Callable[..., None], param: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    p, ms = param.clone(), torch.zeros_like(param)
    arrays = p.numpy(), grad.numpy(), ms.numpy()
    update_(*arrays)
    update_(*arrays)
    return p, ms


def _differing(
    backend: str,
    device: torch.device,
    param: torch.Tensor,
    grad: torch.Tensor,
    expected: tuple[torch.Tensor, torch.Tensor],
) -> int:
    p, g = param.to(device, copy=True), grad.to(device)
    ms = torch.zeros_like(p)
    for _ in range(2):
        rmsprop_(p, g, ms, backend=backend)
    return sum(
        _count_bits(mine.cpu().view(torch.int32) ^ theirs.view(torch.int32))
        for mine, theirs in zip((p, ms), expected, strict=True)
    )


def _count_bits(integers: torch.Tensor) -> int:
    return int(np.unpackbits(integers[integers != 0].numpy().view(np.uint8)).sum())
