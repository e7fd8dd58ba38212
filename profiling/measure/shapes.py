"""What one step updates: networks, the tensors of known models, made by rule, and regular ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hogstream.profiling.measure.networks import NETWORKS, Tensors

Size = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """The parameters of one step.

    Attributes:
        name: As in ``--shapes``.
        tensors: The size of each tensor.
        network: Makes what has them, with a ``forward()`` that takes nothing and gives a loss; None
            for tensors with a cheap backward.
    """

    name: str
    tensors: tuple[Size, ...]
    network: Callable[[], nn.Module] | None = None

    @property
    def elements(self) -> int:
        """How many elements all tensors have together."""
        return sum(map(math.prod, self.tensors))

    def build(self, device: torch.device, seed: int) -> nn.Module:
        """What has these parameters, and gives a loss each time that it is called.

        Args:
            device: Where.
            seed: Of parameters and data.
        """
        with torch.random.fork_rng([] if device.type == "cpu" else [device]), device:
            torch.manual_seed(seed)
            return Tensors(self.tensors) if self.network is None else self.network()


def resnet50() -> Shape:
    """Torchvision's ResNet-50 (He et al. 2015, arXiv 1512.03385) for 1,000 classes."""
    return Shape("resnet50", tuple(_resnet50_sizes()))


def gpt2() -> Shape:
    """GPT-2 small (Radford et al. 2019), whose head is tied to its token embedding."""
    return Shape("gpt2", tuple(_gpt2_sizes()))


def of_network(name: str) -> Shape:
    """One of ``NETWORKS``, with a forward and backward of its own."""
    with torch.device("meta"):
        network = NETWORKS[name]()
    sizes = tuple(tuple(param.shape) for param in network.parameters())
    return Shape(name, sizes, NETWORKS[name])


MODELS: dict[str, Callable[[], Shape]] = {
    "resnet50": resnet50,
    "gpt2": gpt2,
    **{name: partial(of_network, name) for name in NETWORKS},
}


def _resnet50_sizes() -> Iterator[Size]:
    yield from _convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _convolution(channels, width, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(width, 4 * width, 1)
            if block == 0:  # the shortcut, where the number of channels changes
                yield from _convolution(channels, 4 * width, 1)
            channels = 4 * width
    yield from _linear(channels, 1000)


def _convolution(inputs: int, outputs: int, kernel: int) -> Iterator[Size]:
    """A convolution without bias, and the batch norm behind it."""
    yield outputs, inputs, kernel, kernel
    yield from _norm(outputs)


def _gpt2_sizes(width: int = 768) -> Iterator[Size]:
    yield 50257, width  # token embedding, and the head
    yield 1024, width  # positions
    for _ in range(12):
        yield from _norm(width)
        yield from _linear(width, 3 * width)  # queries, keys and values
        yield from _linear(width, width)
        yield from _norm(width)
        yield from _linear(width, 4 * width)
        yield from _linear(4 * width, width)
    yield from _norm(width)


def _norm(width: int) -> Iterator[Size]:
    yield (width,)  # scale
    yield (width,)  # shift


def _linear(inputs: int, outputs: int) -> Iterator[Size]:
    yield outputs, inputs
    yield (outputs,)
