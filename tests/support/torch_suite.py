"""torch's own tables of optimizer tests, with rows for ours: what they are run on, and made from.

The tables are in torch's wheel; the tests that torch runs over them are not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from types import ModuleType
from typing import Any
from unittest import TestCase
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter

from hogstream.optim import RMSprop, RMSpropAsync


@contextmanager
def _nothing_else_changed() -> Iterator[None]:
    """What torch's module of tests sets for a whole process is not set, or set back.

    It needs ``expecttest`` for a base class of tests of torch's own: any will do.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ))
        stack.enter_context(patch.object(torch.backends, "disable_global_flags"))
        for probe in ("torch.cuda.is_available", "torch.utils._triton.has_triton"):
            stack.enter_context(patch(probe, return_value=False))  # else it would start CUDA
        for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod):
            stack.enter_context(patch.object(kind, "__call__", kind.__call__))
        if find_spec("hypothesis"):
            from hypothesis import settings

            settings.register_profile("as it was", settings.default)
            stack.callback(settings.load_profile, "as it was")
        if not find_spec("expecttest"):
            stand_in: Any = ModuleType("expecttest")
            stand_in.TestCase = TestCase
            sys.modules["expecttest"] = stand_in
            stack.callback(sys.modules.pop, "expecttest")
        yield


with _nothing_else_changed():
    _tables: Any = import_module("torch.testing._internal.common_optimizers")

(TORCH,) = (info for info in _tables.optim_db if info.optim_cls is torch.optim.RMSprop)

Params = Sequence[torch.Tensor]


def _inputs(own: dict[str, Any], more: dict[str, dict[str, Any]]) -> Callable[..., list[Any]]:
    """torch's inputs for its RMSprop, with an option of ours in each, and inputs of our own."""

    def inputs(device: str, dtype: torch.dtype | None = None) -> list[Any]:
        torchs = [
            _tables.OptimizerInput(None, {**each.kwargs, **own}, each.desc)
            for each in TORCH.optim_inputs_func(device, dtype)
        ]
        return torchs + [
            _tables.OptimizerInput(None, kwargs, name) for name, kwargs in more.items()
        ]

    return inputs


#: What torch has no input for, but an option.
_MORE_OF_TORCHS: dict[str, dict[str, Any]] = {
    "momentum alone": {"momentum": 0.9},
    "centered alone": {"centered": True},
    "Tensor lr": {"lr": torch.tensor(0.001)},
}
_OURS: dict[str, dict[str, Any]] = {
    "eps inside": {},
    "eps inside, momentum, centered": {"momentum": 0.9, "centered": True},
    "of TensorFlow": {
        "momentum": 0.9,
        "lr_in_momentum": True,
        "initial_accumulator_value": 1.0,
    },
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "flat": {"flat": True},
}

INFOS = [
    _tables.OptimizerInfo(
        RMSprop,
        optim_inputs_func=_inputs({}, _MORE_OF_TORCHS),
        optim_error_inputs_func=TORCH.optim_error_inputs_func,
        supported_impls=TORCH.supported_impls,
        has_capturable_arg=True,
    ),
    _tables.OptimizerInfo(
        RMSpropAsync,
        optim_inputs_func=_inputs({"eps_inside_sqrt": False}, _OURS),
        optim_error_inputs_func=TORCH.optim_error_inputs_func,
        supported_impls=TORCH.supported_impls,
        has_capturable_arg=True,
    ),
]


_TORCHS_OPTIONS = torch.optim.RMSprop([torch.ones(1)]).defaults.keys()


@dataclass(frozen=True)
class Row:
    """An optimizer of ours with options, and the device that its parameters are on."""

    info: Any
    device: str
    kwargs: dict[str, Any]

    def make(self, params: Any, **more: Any) -> Any:
        """The optimizer, with nothing shared between two of them."""
        return self.info.optim_cls(params, **deepcopy(self.kwargs), **more)

    @property
    def is_torchs(self) -> bool:
        """Whether torch's RMSprop has all options of the row, which mean the same there."""
        outside = self.info.optim_cls is RMSprop or self.kwargs.get("eps_inside_sqrt") is False
        return outside and self._torchs_kwargs().keys() <= _TORCHS_OPTIONS

    def make_torchs(self, params: Any, **more: Any) -> torch.optim.RMSprop:
        """torch's RMSprop with the same options, a loop over its parameters."""
        kwargs = {"foreach": False, **deepcopy(self._torchs_kwargs()), **more}
        return torch.optim.RMSprop(params, **kwargs)

    def _torchs_kwargs(self) -> dict[str, Any]:
        return {name: value for name, value in self.kwargs.items() if name != "eps_inside_sqrt"}

    @property
    def is_refused(self) -> bool:
        """Whether torch's table has crossed options that do not go together in ours."""
        of_leaves = self.kwargs.get("flat") or self.kwargs.get("capturable")
        return bool(of_leaves and self.kwargs.get("differentiable"))

    @property
    def ascends(self) -> bool:
        return bool(self.kwargs.get("maximize"))


_MARKS_ON: dict[str, list[Any]] = {"cpu": []}
if torch.cuda.is_available():
    _MARKS_ON["cuda"] = [pytest.mark.gpu]


def rows(*, differentiable: bool = False, torchs: bool = False) -> list[Any]:
    """The table as parameters of a test, with ``foreach`` as it is by default.

    Args:
        differentiable: With each once more as a differentiable one.
        torchs: Those alone that torch's RMSprop can be asked for.
    """
    skip = ("foreach",) if differentiable else ("foreach", "differentiable")
    found = []
    for info, (device, marks) in product(INFOS, _MARKS_ON.items()):
        inputs = _tables._get_optim_inputs_including_global_cliquey_kwargs(
            device, torch.float32, info, skip=skip
        )
        for each in inputs:
            row = Row(info, device, each.kwargs)
            if (row.is_torchs or not torchs) and not row.is_refused:
                name = f"{info.name}-{device}-{each.desc}"
                found.append(pytest.param(row, id=name, marks=marks))
    return found


each_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
each_row = pytest.mark.parametrize("row", rows())
each_differentiable = pytest.mark.parametrize("row", rows(differentiable=True))
each_of_torchs = pytest.mark.parametrize("row", rows(torchs=True))


SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0,)]


def filled(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """A tensor of the same dtype and layout, of standard normal values: the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.complex128 if tensor.is_complex() else torch.float64
    values = torch.randn(tensor.shape, generator=generator, dtype=drawn)
    return torch.empty_like(tensor, requires_grad=False).copy_(values)


def params_of(
    *shapes: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Parameter]:
    """Parameters of standard normal values: the same at every call."""
    return [
        Parameter(filled(torch.empty(shape, device=device, dtype=dtype), seed))
        for seed, shape in enumerate(shapes)
    ]


def params_in(optimizer: Any) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_grads(params: Params, step: int) -> None:
    """Gives parameters gradients that depend on the step and the parameter's place alone."""
    for place, param in enumerate(params):
        param.grad = filled(param.detach(), seed=1000 + 100 * step + place)


@dataclass
class LeastSquares:
    """A weight and a bias, whose sum of squares of ``weight @ input + bias`` is the loss."""

    weight: Parameter
    bias: Parameter
    input: torch.Tensor

    @classmethod
    def made(cls, device: str) -> LeastSquares:
        """The same at every call."""
        weight, bias = params_of((10, 5), (10,), device=device)
        return cls(weight, bias, torch.linspace(-1, 2, 5, device=device))

    @property
    def params(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def named(self) -> list[tuple[str, Parameter]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> torch.Tensor:
        return (self.weight.mv(self.input) + self.bias).square().sum()

    def backward(self) -> torch.Tensor:
        """The loss, with new gradients of it."""
        for param in self.params:
            param.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def train(self, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            self.backward()
            optimizer.step()
