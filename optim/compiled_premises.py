"""The premises of a plan, held against what there is by compiled code: 0.1 us a parameter.

Python takes ten times as long for the same, of which most is making objects and comparing them.
What a plan depends on is noted here as numbers, in the order in which compiled code walks over the
optimizer: its groups, its state, then each parameter with its state and gradient. An object is
noted by its address, and kept alive, so that no other can be there.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import types

from hogstream.kernels.backends.numba_atomics import atomic_load, atomic_store
from hogstream.kernels.backends.numba_compile import njit, with_the_gil
from hogstream.optim.object_access import (
    ANYWHERE,
    FOUND_WORDS,
    NO_GRADIENT,
    after_facts,
    bump_version,
    device_of,
    dict_next,
    dict_size,
    facts_of,
    gradient_of,
    handle_of,
    has_facts,
    hold,
    is_negated,
    is_on_device,
    is_strided,
    list_item,
    list_size,
    release,
)
from hogstream.optim.state import STATE

Groups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, torch.Tensor]]
Int64s = npt.NDArray[np.int64]

_WORD = 8
# What gradient is expected of a parameter: none, one anywhere, the one in flat memory.
_NONE, _ANYWHERE, _IN_FLAT = range(3)
# Where the addresses stand of what is noted, and two numbers: ``CompiledPremises._words``.
_LISTS, _STATE, _PARAMS, _WRITTEN, _TO_USE, _NO_GRADIENT, _GRADIENTS = range(0, 7 * _WORD, _WORD)
_ANY_VALUE = 0
_DICTS = dict, defaultdict
# Words to use: those of ``has_facts``, for ``dict_next``, and for the address of a tensor's data.
_SCRATCH, _POINTER, _WORDS_TO_USE = FOUND_WORDS * _WORD, (FOUND_WORDS + 3) * _WORD, FOUND_WORDS + 4


class HeldGradients:
    """The gradients of a step: where they are, and a hold on each that keeps it alive.

    Attributes:
        pointers: int64, shape (gradients,).
        address: Of as many holds, each 0 as yet; the pointers follow them.
    """

    def __init__(self, words: ctypes.Array[ctypes.c_int64]) -> None:
        """Takes two words of zero for each gradient."""
        # ctypes tells an address in a call; NumPy runs much Python, which a backward has evicted.
        self.address = ctypes.addressof(words)
        self.pointers = np.frombuffer(memoryview(words), np.int64)[len(words) // 2 :]

    def __del__(self) -> None:
        _release_all(self.address, len(self.pointers))


class CompiledPremises:
    """All that a plan depends on, noted for compiled code.

    Attributes:
        reached: The parameters that had a gradient.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state, of all parameters that have a gradient.
        written: Starts and ends of the memory that updates write, by address: no gradient may be
            there.
        in_flat: Which of the parameters that have a gradient, counted from 0, must have it where it
            is, in memory that the optimizer keeps; others may have another one of the same kind.

    Raises:
        TypeError: If it takes Python to read something: a tensor of a class of somebody else's, a
            state that is no dict, a parameter that keeps no versions.
        KeyError: If a tensor's dtype or device is none that is known here.
    """

    def __init__(
        self, groups: Groups, state: State, written: tuple[Int64s, Int64s], in_flat: Sequence[int]
    ) -> None:
        params = [param for group in groups for param in group["params"]]
        grads = [param.grad for param in params]  # read once: other threads may change them
        reached = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        _check_readable(state, reached)
        lists = [[len(group["params"]), *map(id, group["params"])] for group in groups]
        flat = {id(reached[place]) for place in in_flat}
        noted = [
            _note_param(param, grad, state, id(param) in flat)
            for param, grad in zip(params, grads, strict=True)
        ]
        self.reached = reached
        self._kept = params, list(state.items()), [list(state[each].items()) for each in reached]
        self._gradients = len(reached)
        self._two_words_each = ctypes.c_int64 * (
            2 * len(reached)
        )  # a class, which takes long to make
        self._handles = _words(map(handle_of, reached))
        self._parts = (
            _words([len(lists), *chain.from_iterable(lists)]),
            _words(_note_dict(state)),
            _words([len(params), *chain.from_iterable(noted)]),
            np.concatenate([[len(written[0])], *written]),
            np.zeros(_WORDS_TO_USE, np.int64),
        )
        addresses = (part.ctypes.data for part in self._parts)
        self._words = _words([*addresses, NO_GRADIENT, len(reached)])
        self._address, self._address_of_handles = self._words.ctypes.data, self._handles.ctypes.data

    def gradients(self, groups: Groups, state: State) -> HeldGradients | None:
        """The gradients that there are now; None if anything else is not as it was."""
        lists = [group["params"] for group in groups]
        if set(map(type, lists)) - {list} or type(state) not in _DICTS:
            return None
        gradients = HeldGradients(self._two_words_each())
        held = _hold_gradients(self._address, id(lists), id(state), gradients.address)
        return gradients if held else None

    def bump_versions(self) -> None:
        """Tells autograd that the parameters have changed."""
        _bump_versions(self._address_of_handles, self._gradients)


def _words(numbers: Iterable[int]) -> Int64s:
    return np.fromiter(numbers, np.int64)


def _check_readable(state: State, reached: Sequence[torch.Tensor]) -> None:
    states = [state[param] for param in reached]
    if type(state) not in _DICTS or any(type(each) is not dict for each in states):
        raise TypeError("compiled code takes state in dicts")
    if any(param.is_inference() for param in reached):
        raise TypeError("compiled code takes parameters that keep versions")


def _note_param(
    param: torch.Tensor, grad: torch.Tensor | None, state: State, in_flat: bool
) -> Iterator[int]:
    yield handle_of(param)
    if grad is None:
        yield _NONE
        return
    of_param, ms = state[param], state[param]["square_avg"]
    handle_of(grad)  # which is of torch's own class
    yield _IN_FLAT if in_flat else _ANYWHERE
    yield from facts_of(param, param.data_ptr())
    yield id(of_param)
    yield from _note_dict(of_param, STATE)
    yield handle_of(ms)
    yield from facts_of(ms, ms.data_ptr())
    yield grad.data_ptr()
    yield grad.nbytes
    yield from device_of(grad)
    yield from facts_of(grad, grad.data_ptr() if in_flat else ANYWHERE)


def _note_dict(dictionary: dict[Any, Any], names: Collection[str] | None = None) -> Iterator[int]:
    """Its size, and each key and value; of other keys than ``names`` no value."""
    yield len(dictionary)
    for key, value in dictionary.items():
        yield id(key)
        yield id(value) if names is None or key in names else _ANY_VALUE


@njit
def _same_lists(lists: int, noted: int) -> bool:
    """Whether a list of lists of objects is as noted: how many, then each one's size and items."""
    if list_size(lists) != atomic_load(noted):
        return False
    for index in range(list_size(lists)):
        noted += _WORD
        items = list_item(lists, index)
        if list_size(items) != atomic_load(noted):
            return False
        for place in range(list_size(items)):
            noted += _WORD
            if list_item(items, place) != atomic_load(noted):
                return False
    return True


@njit
def _same_dict(dictionary: int, noted: int, scratch: int) -> bool:
    """Whether a dict is as ``_note_dict`` noted, in the same order."""
    if dict_size(dictionary) != atomic_load(noted):
        return False
    atomic_store(scratch, 0)
    for _ in range(atomic_load(noted)):
        dict_next(dictionary, scratch, scratch + _WORD, scratch + 2 * _WORD)
        key, value = atomic_load(noted + _WORD), atomic_load(noted + 2 * _WORD)
        if atomic_load(scratch + _WORD) != key:
            return False
        if value != _ANY_VALUE and atomic_load(scratch + 2 * _WORD) != value:
            return False
        noted += 2 * _WORD
    return True


@njit
def _after_dict(noted: int) -> int:
    items: int = atomic_load(noted)
    return noted + _WORD + 2 * _WORD * items


@njit
def _after_param(param: int, noted: int, to_use: int) -> int:
    """The address after a parameter's facts and state; 0 if they are not as noted."""
    scratch, pointer = to_use + _SCRATCH, to_use + _POINTER
    if is_negated(param) != 0 or not has_facts(param, noted, pointer, to_use):
        return 0
    noted = after_facts(noted)
    if not _same_dict(atomic_load(noted), noted + _WORD, scratch):
        return 0
    noted = _after_dict(noted + _WORD)
    if not has_facts(atomic_load(noted), noted + _WORD, pointer, to_use):
        return 0
    return after_facts(noted + _WORD)


@njit
def _is_apart(start: int, size: int, written: int) -> bool:
    """Whether memory is apart from spans: how many, then their starts, in order, and ends."""
    spans = atomic_load(written)
    # The span that matters is the last that starts before the memory ends.
    first, end = 0, spans
    while first < end:
        middle = (first + end) // 2
        if atomic_load(written + _WORD * (1 + middle)) < start + size:
            first = middle + 1
        else:
            end = middle
    return bool(first == 0 or atomic_load(written + _WORD * (spans + first)) <= start)


@njit
def _is_usable(grad: int, noted: int, written: int, pointer: int, to_use: int) -> bool:
    """Whether a gradient may be read where it is.

    Noted are its last address, how many bytes it has, its device, and its facts.
    """
    if not is_strided(grad, to_use) or is_negated(grad) != 0:
        return False
    if not has_facts(grad, noted + 4 * _WORD, pointer, to_use):
        return False
    address = atomic_load(pointer)
    if address != atomic_load(noted):  # which no other device has
        if not is_on_device(grad, noted + 2 * _WORD, to_use):
            return False
        if not _is_apart(address, atomic_load(noted + _WORD), written):
            return False
        atomic_store(noted, address)  # which need not be looked for again
    return True


@with_the_gil(types.int64(*[types.int64] * 4))
def _hold_gradients(
    premises: int,  # address of where all is noted: ``CompiledPremises._words``
    lists: int,  # Python's list of the parameters of each group
    state: int,  # Python's dict
    gradients: int,  # ``HeldGradients.address``
) -> int:
    """1 if all is as noted; if it is not, some gradients may be held all the same."""
    to_use = atomic_load(premises + _TO_USE)
    if not _same_lists(lists, atomic_load(premises + _LISTS)):
        return 0
    if not _same_dict(state, atomic_load(premises + _STATE), to_use + _SCRATCH):
        return 0
    written, no_gradient = atomic_load(premises + _WRITTEN), atomic_load(premises + _NO_GRADIENT)
    pointers = gradients + _WORD * atomic_load(premises + _GRADIENTS)
    noted = atomic_load(premises + _PARAMS)
    params = atomic_load(noted)
    noted += _WORD
    for _ in range(params):
        param, expected = atomic_load(noted), atomic_load(noted + _WORD)
        noted += 2 * _WORD
        grad = gradient_of(atomic_load(param))
        if (atomic_load(grad) == no_gradient) != (expected == _NONE):
            return 0
        if expected == _NONE:
            continue
        if expected == _ANYWHERE:
            # Held before it is looked at, as Python does: other threads may drop it.
            if hold(grad, gradients) != 0:
                return 0
            grad = atomic_load(gradients)
        noted = _after_param(param, noted, to_use)
        if noted == 0 or not _is_usable(grad, noted, written, pointers, to_use):
            return 0
        noted = after_facts(noted + 4 * _WORD)
        gradients += _WORD
        pointers += _WORD
    return 1


@with_the_gil(types.int64(*[types.int64] * 2))
def _release_all(held: int, count: int) -> int:
    for place in range(count):
        tensor = atomic_load(held + place * _WORD)
        if tensor != 0:
            release(tensor)
    return 0


@with_the_gil(types.int64(*[types.int64] * 2))
def _bump_versions(handles: int, count: int) -> int:
    for place in range(count):
        bump_version(atomic_load(handles + place * _WORD))
    return 0
