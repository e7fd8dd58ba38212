"""Checks of plain arguments, so that each is worded alike everywhere."""

from __future__ import annotations

import asyncio
import inspect
import math
import operator
from typing import Any, TypeVar

C = TypeVar("C")


class SettingError(ValueError):
    """A value that is not allowed.

    Attributes:
        name: Of the argument that has it.
        reason: What is allowed and what it was given, as follows the name in the error's text.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # from which it is unpickled
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


def check_integer(name: str, value: Any, at_least: int, at_most: int | None = None) -> int:
    """An integer argument, NumPy's among them.

    Raises:
        TypeError: If it is no integer.
        SettingError: If it is out of range.
    """
    allowed = f"an integer >= {at_least}" + ("" if at_most is None else f" and <= {at_most}")
    try:
        if isinstance(value, bool):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {value!r}") from None
    if integer < at_least or (at_most is not None and integer > at_most):
        raise SettingError(name, f"must be {allowed}, got {value!r}")
    return integer


def check_number(name: str, value: Any, *, above: float | None = None) -> float:
    """A finite number: > ``above`` if given, else >= 0.

    Raises:
        TypeError: If it is no number.
        SettingError: If it is out of range.
    """
    allowed = "a finite number >= 0" if above is None else f"a finite number > {above:g}"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or (number < 0 if above is None else number <= above):
        raise SettingError(name, f"must be {allowed}, got {value!r}")
    return number


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of some words.

    Raises:
        SettingError: If it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise SettingError(name, f"must be one of {', '.join(allowed)}, got {value!r}")
    return value


def check_switch(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_type(name: str, value: Any, kind: type) -> None:
    """An object of a class of ours.

    Raises:
        TypeError: If it is another.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__}")


def check_callable(name: str, value: C) -> C:
    """A function that is called, and not awaited.

    Raises:
        TypeError: If it cannot be called, or what it returns must be awaited.
    """
    if not callable(value) or inspect.iscoroutinefunction(value):
        raise TypeError(f"{name} must be a plain function, got {value!r}")
    return value


def check_async_callable(name: str, value: C, *, verb: str = "be") -> C:
    """A function or another callable whose result is awaited, as far as it can be told.

    Args:
        name: Of the argument.
        value: What was given.
        verb: What the argument must do with it, if it is not the argument itself.

    Raises:
        TypeError: If it cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must {verb} an async callable, got {value!r}")
    return value


def check_loop(what: str, loop: asyncio.AbstractEventLoop) -> None:
    """Checks that what belongs to an event loop is used in that one.

    Raises:
        RuntimeError: If another one is running.
    """
    if asyncio.get_running_loop() is not loop:
        raise RuntimeError(
            f"{what} must be used in the event loop that it was opened in, got another one: "
            f"open and use it in one call of asyncio.run()"
        )


def error_text(error: BaseException) -> str:
    """What kind of error it is and what it says, which may raise in turn."""
    try:
        text = str(error)
    except Exception as failure:
        text = f"(its text cannot be made: {type(failure).__name__})"
    return f"{type(error).__name__}: {text}"
