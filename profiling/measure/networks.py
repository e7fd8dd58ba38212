"""Networks that hold their own data: each call gives a loss, whose backward makes new gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

# A product of such matrices takes all threads of torch for a millisecond or so, and goes through
# some megabytes, as the layers of a backward do.
_PRODUCT = 512
_CLASSES = 10
_WORDS = 1000


class Tensors(nn.Module):
    """Tensors of any sizes, whose backward is cheap: a matrix product, then each gradient.

    The gradients are random, and the same at each call but for rounding.
    """

    def __init__(self, sizes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.ones(size) for size in sizes)
        for index, size in enumerate(sizes):
            self.register_buffer(f"factor{index}", torch.randn(size).flatten())
        self.register_buffer("left", torch.rand(_PRODUCT, _PRODUCT))
        self.register_buffer("right", torch.rand(_PRODUCT, _PRODUCT) / _PRODUCT)

    def forward(self) -> torch.Tensor:
        """The loss, 0-dimensional."""
        factors = map(self.get_buffer, (f"factor{index}" for index in range(len(self.tensors))))
        dots = [
            torch.dot(tensor.flatten(), factor)
            for tensor, factor in zip(self.tensors, factors, strict=True)
        ]
        left, right = self.get_buffer("left"), self.get_buffer("right")
        # Backward comes to the product first, and makes all gradients of what comes out of it.
        return (torch.stack(dots).sum() * left @ right).mean()


class Classifier(nn.Module):
    """Layers that are trained on one batch."""

    def __init__(self, layers: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> None:
        """Takes the batch.

        Args:
            layers: Give logits of shape (..., number of classes).
            inputs: What they take.
            classes: int64, of the shape of the logits but for the last dimension.
        """
        super().__init__()
        self.layers = layers
        self.register_buffer("inputs", inputs)
        self.register_buffer("classes", classes)

    def forward(self) -> torch.Tensor:
        """The loss, 0-dimensional."""
        logits = self.layers(self.get_buffer("inputs"))
        return functional.cross_entropy(logits.flatten(0, -2), self.get_buffer("classes").flatten())


def mlp() -> Classifier:
    """Three layers of 2.1 million parameters, on 64 vectors."""
    layers = nn.Sequential(
        *(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()),
        nn.Linear(1024, _CLASSES),
    )
    return Classifier(layers, torch.randn(64, 1024), torch.randint(_CLASSES, (64,)))


def transformer() -> Classifier:
    """Two layers (Vaswani et al. 2017), 27 tensors, 2.1 million parameters, on 4 texts."""
    layers = nn.Sequential(
        nn.Embedding(_WORDS, 256),
        *(nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True) for _ in range(2)),
        nn.Linear(256, _WORDS),
    )
    words = torch.randint(_WORDS, (4, 65))
    return Classifier(layers, words[:, :-1], words[:, 1:])


def cnn() -> Classifier:
    """Three convolutions and two layers, 4.3 million parameters, on 16 images of 32x32."""
    layers = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128 * 8 * 8, 512), nn.ReLU(), nn.Linear(512, _CLASSES)),
    )
    return Classifier(layers, torch.randn(16, 3, 32, 32), torch.randint(_CLASSES, (16,)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "transformer": transformer,
    "cnn": cnn,
}
