"""What one step updates: the tensors of known models, made by rule, and regular ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Size = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """The parameters of one step.

    Attributes:
        name: As in ``--shapes``.
        tensors: The size of each tensor.
    """

    name: str
    tensors: tuple[Size, ...]

    @property
    def elements(self) -> int:
        """How many elements all tensors have together."""
        return sum(map(math.prod, self.tensors))


def resnet50() -> Shape:
    """Torchvision's ResNet-50 (He et al. 2015, arXiv 1512.03385) for 1,000 classes."""
    return Shape("resnet50", tuple(_resnet50_sizes()))


def gpt2() -> Shape:
    """GPT-2 small (Radford et al. 2019), whose head is tied to its token embedding."""
    return Shape("gpt2", tuple(_gpt2_sizes()))


MODELS = {"resnet50": resnet50, "gpt2": gpt2}


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
