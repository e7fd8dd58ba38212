"""Updates of a known number of elements, for ``hogstream profile ncu`` to count the bytes of."""

from __future__ import annotations

import sys

import torch

from hogstream.kernels import multi_tensor_rmsprop_, rmsprop_
from hogstream.profiling.capture import captured
from hogstream.profiling.environment import best_device

#: How often each kernel is launched.
LAUNCHES = 3
_TENSORS = 64


def main() -> None:
    """Updates as many elements as the command line says, in one tensor and in 64."""
    device = best_device()
    if device.type != "cuda":
        sys.exit("hogstream: profile ncu needs a CUDA device, and torch finds none")
    update(int(sys.argv[1]), device)


def update(elements: int, device: torch.device) -> None:
    """Updates ``elements`` of float32: each launch updates all of them."""
    flat = [torch.zeros(elements, device=device) for _ in range(3)]
    parts = [list(tensor.tensor_split(_TENSORS)) for tensor in flat]

    def launch() -> None:
        rmsprop_(*flat, lr=1e-3, alpha=0.99, eps=1e-8)
        multi_tensor_rmsprop_(*parts, lr=1e-3, alpha=0.99, eps=1e-8)

    launch()  # compiles
    with captured(device):
        for _ in range(LAUNCHES):
            launch()


if __name__ == "__main__":
    main()
