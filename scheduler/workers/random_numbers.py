"""A worker's own random numbers, whatever other threads draw meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What chooses an operation that draws, and draws nothing itself.
_CHOOSING = {"aten::_fused_sdp_choice"}
# Without a generator, an operation draws only if all of these that it takes are set.
_SWITCHES = {"dropout_p", "dropout", "train"}


class RandomNumbers:
    """What a thread's code draws, from generators of its own: one for each type of device.

    torch's default generators are one for the whole process, so what one thread draws depends on
    what others do. This gives a generator to every operation that draws as it comes to torch's
    dispatcher, where all of them are marked: it misses none, also none within others.
    """

    def __init__(self, seed: str) -> None:
        """Begins them.

        Args:
            seed: Equal ones give equal numbers.
        """
        self._seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def drawn(self) -> AbstractContextManager[object]:
        """A context in which the thread draws from them.

        In it, an operation that draws and takes no generator raises ``RuntimeError``, such as the
        dropout of cuDNN's LSTM.
        """
        return _Drawing(self)

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator for a device."""
        generator = self._generators.get(device.type)
        if generator is None:
            generator = self._generators[device.type] = torch.Generator(device)
            generator.manual_seed(random.Random(f"{self._seed}/{device.type}").getrandbits(63))
        return generator


class NothingDrawn(TorchDispatchMode):
    """A context for a backward, in which what would draw raises ``RuntimeError``.

    That is a forward that is run again, as by ``torch.utils.checkpoint``: it would have to draw the
    same numbers again.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls an operation of torch."""
        kwargs = kwargs or {}
        if _may_draw(func) and _draws(func, args, kwargs):
            raise RuntimeError(
                f"seed must be None for a loss whose backward draws random numbers by {func}: what "
                f"it runs again, as torch.utils.checkpoint does, would not draw the same"
            )
        return func(*args, **kwargs)


class _Drawing(TorchDispatchMode):
    def __init__(self, numbers: RandomNumbers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers = numbers

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _may_draw(func) or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        taking = _taking_generator(func)
        if taking is None:
            raise RuntimeError(
                f"seed must be None for a loss that draws random numbers by {func}, which takes no "
                f"generator"
            )
        device = next((each.device for each in args if isinstance(each, torch.Tensor)), None)
        device = device or torch.device(kwargs.get("device") or "cpu")
        return taking(*args, **{**kwargs, "generator": self._numbers.generator(device)})


@cache
def _may_draw(operation: Any) -> bool:
    return (
        torch.Tag.nondeterministic_seeded in operation.tags
        and operation._schema.name not in _CHOOSING
    )


def _draws(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operation that may draw does so."""
    names = [each.name for each in operation._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if "generator" in names:
        return given.get("generator") is None  # else it has one of the loss's own
    return all(given.get(name) or name not in names for name in _SWITCHES)


@cache
def _taking_generator(operation: Any) -> Callable[..., Any] | None:
    """An operation, or what is the same with a generator; None if there is none."""
    if operation is torch.ops.aten.native_dropout.default:
        return _dropout
    names = [each.name for each in operation._schema.arguments]
    if "generator" in names:
        return operation  # type: ignore[no-any-return]
    packet = operation.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        others = [each.name for each in overload._schema.arguments]
        if "generator" in others and [each for each in others if each != "generator"] == names:
            return overload  # type: ignore[no-any-return]
    return None


def _dropout(
    input: torch.Tensor, p: float, train: bool | None, *, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.native_dropout``: what is left of the input, scaled, and the mask of that."""
    kept = torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return input * kept * (0.0 if p == 1 else 1 / (1 - p)), kept
