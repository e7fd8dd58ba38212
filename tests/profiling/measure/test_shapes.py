"""The tensors of models are those that they have, and shapes are read as they are written."""

from __future__ import annotations

from collections import Counter

import pytest

from hogstream.cli import options
from hogstream.profiling.measure.shapes import gpt2, resnet50


def test_resnet50_is_torchvisions() -> None:
    shape = resnet50()
    assert (len(shape.tensors), shape.elements) == (161, 25_557_032)
    assert shape.tensors[:3] == ((64, 3, 7, 7), (64,), (64,))
    assert shape.tensors[-2:] == ((1000, 2048), (1000,))
    kinds = Counter(map(len, shape.tensors))
    assert kinds == {4: 53, 2: 1, 1: 2 * 53 + 1}  # convolutions, the classifier, norms and its bias


def test_gpt2_is_the_small_one() -> None:
    shape = gpt2()
    assert (len(shape.tensors), shape.elements) == (148, 124_439_808)
    assert shape.tensors[:2] == ((50257, 768), (1024, 768))
    assert Counter(map(len, shape.tensors)) == {2: 2 + 12 * 4, 1: 12 * 8 + 2}


@pytest.mark.parametrize(
    ("text", "tensors"),
    [
        ("16", ((16,),)),
        ("2^4", ((16,),)),
        ("3x5", ((5,), (5,), (5,))),
        ("2x2^3", ((8,), (8,))),
        ("resnet50", resnet50().tensors),
    ],
)
def test_shape_is_read_as_written(text: str, tensors: tuple[tuple[int, ...], ...]) -> None:
    (shape,) = options.shapes(text)
    assert (shape.name, shape.tensors) == (text, tensors)
