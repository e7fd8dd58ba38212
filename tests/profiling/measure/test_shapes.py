"""The tensors of models are those that they have, and shapes are read as they are written."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hogstream.cli import options
from hogstream.profiling.measure.shapes import gpt2, resnet50

CPU = torch.device("cpu")


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
    ("name", "tensors", "millions"),
    [("mlp", 6, 2.11), ("transformer", 27, 2.09), ("cnn", 10, 4.29), ("3x5", 3, 0.0)],
)
def test_each_call_of_a_network_makes_new_gradients_of_all_parameters(name, tensors, millions):
    (shape,) = options.shapes(name)
    assert (len(shape.tensors), round(shape.elements / 1e6, 2)) == (tensors, millions)
    network = shape.build(CPU, seed=0)
    params = list(network.parameters())
    assert tuple(tuple(param.shape) for param in params) == shape.tensors
    kept = []
    for _ in range(2):
        network.zero_grad()
        network().backward()
        grads = [param.grad for param in params if param.grad is not None]
        assert len(grads) == len(params)
        assert all(torch.any(grad != 0) for grad in grads)
        kept.append(grads)
    assert not {grad.data_ptr() for grad in kept[0]} & {grad.data_ptr() for grad in kept[1]}


def test_a_seed_makes_a_network_and_touches_no_other_random_numbers():
    (shape,) = options.shapes("mlp")
    state = torch.get_rng_state()
    first, same, other = (shape.build(CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(first.get_buffer("inputs"), other.get_buffer("inputs"))


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
