"""What a child of ``os.fork`` has from its parent, and must leave alone.

A fork copies file descriptors and handlers, but not the threads behind them. What the child reads,
writes or takes out of a selector through them, the parent misses; what it ends at its exit is its
parent's. So whoever holds such things is told here to let go of them, ahead of all else in a child.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from contextlib import ExitStack, suppress
from typing import Protocol
from weakref import WeakSet


class Holder(Protocol):
    """Who holds what must not be used after a fork."""

    def let_go(self) -> None:
        """Lets go of it, in the child."""


_holders: WeakSet[Holder] = WeakSet()


def let_go_in_forks(holder: Holder) -> None:
    """Has its ``let_go`` called in each child of ``os.fork``, until it is forgotten or dies."""
    _holders.add(holder)


def forget_in_forks(holder: Holder) -> None:
    """It holds nothing any more that a child would have to leave alone."""
    _holders.discard(holder)


def cut_off(descriptor: int) -> None:
    """Has a file descriptor lead nowhere; its number stays taken, so that no other file gets it."""
    os.close(descriptor)
    with suppress(OSError):  # where there is no /dev/null
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor, inheritable=False)
            os.close(nowhere)


def part_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Gives an event loop of asyncio, in the child, a selector of its own, that waits for nothing.

    What the loop takes out of the other when it is closed, as ``asyncio.run`` does it, the parent
    would wait for in vain: it is one in both processes.
    """
    if isinstance(loop, asyncio.SelectorEventLoop):
        vars(loop)["_selector"] = selectors.DefaultSelector()


def _let_go_of_all() -> None:
    with ExitStack() as stack:  # all, whatever goes wrong with one
        for holder in tuple(_holders):
            stack.callback(holder.let_go)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_all)
