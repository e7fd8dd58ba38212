"""Times the host's part of ``step()``: what each tensor costs, where gradients stay and where not.

Tensors are so small that the host's work is all that takes time. Optimizers take turns. ``hogstream
compare --shapes 100x64`` measures steps after a backward, whose gradients lie elsewhere each time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.optim import Optimizer

from hogstream.optim import RMSpropAsync

TENSORS = (10, 100, 1000)
ELEMENTS = 64
ROUNDS = 50
OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], Optimizer]] = {
    "hogstream": RMSpropAsync,
    "hogstream flat": partial(RMSpropAsync, flat=True),
    "torch foreach": partial(torch.optim.RMSprop, foreach=True),
}


def main() -> None:
    """Prints medians, in microseconds a step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'':28}" + "".join(f"{tensors:>8,} tensors" for tensors in TENSORS))
    columns = [_microseconds(tensors, device) for tensors in TENSORS]
    for name in columns[0]:
        print(f"{name:28}" + "".join(f"{column[name]:13,.0f} us" for column in columns))


def _microseconds(tensors: int, device: torch.device) -> dict[str, float]:
    """The median of each optimizer, by name."""
    steps = {
        f"{name}, {which} gradients": _step(make, tensors, device, new=which == "new")
        for name, make in OPTIMIZERS.items()
        for which in ("kept", "new")
        if (name, which) != ("hogstream flat", "new")  # whose gradients have their place
    }
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + ROUNDS):
        for name, seconds in steps.items():
            samples[name].append(1e6 * seconds())
    return {name: statistics.median(times[1:]) for name, times in samples.items()}


def _step(
    make: Callable[[list[torch.Tensor]], Optimizer],
    tensors: int,
    device: torch.device,
    *,
    new: bool,
) -> Callable[[], float]:
    """Does a step of an optimizer, with new gradients or not; returns the host's seconds."""
    params: list[torch.Tensor] = [
        torch.nn.Parameter(torch.randn(ELEMENTS, device=device)) for _ in range(tensors)
    ]
    optimizer = make(params)
    for param in params:
        param.grad = torch.randn_like(param) if param.grad is None else param.grad
    others = [torch.randn_like(param) for param in params]

    def step() -> float:
        if new:
            for index, param in enumerate(params):
                param.grad, others[index] = others[index], param.grad
        start = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.synchronize()
        return seconds

    return step


if __name__ == "__main__":
    main()
