"""The premises of a plan, held against what there is by compiled code: 0.1 us a parameter.

Python takes ten times as long for the same, of which most is making objects and comparing them.
What a plan depends on is noted here as numbers, in the order in which compiled code walks over the
optimizer: its groups, its state, then each parameter with its state and gradient. An object is
noted by its address, and kept alive, so that no other can be there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from numba import types

from hogstream.kernels.backends.numba_atomics import atomic_load, plain_store, prefetch
from hogstream.kernels.backends.numba_compile import part, with_the_gil
from hogstream.optim.object_access import (
    ANYWHERE,
    FOUND_WORDS,
    NO_GRADIENT,
    TENSOR_LINES,
    after_facts,
    assign,
    bump_version,
    device_of,
    dict_item,
    dict_next,
    dict_size,
    facts_of,
    gradient_of,
    handle_of,
    has_facts,
    is_negated,
    is_on_device,
    is_strided,
    list_item,
    list_size,
    memory_of,
    memory_of_dict,
    memory_of_gradient,
    requires_gradient,
    type_of,
)
from hogstream.optim.state import STATE

if TYPE_CHECKING:
    from hogstream.optim.step_plan import StepMemory

Groups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, torch.Tensor]]
Int64s = npt.NDArray[np.int64]

_WORD, _CACHE_LINE = 8, 64
# What gradient is expected of a parameter: none, one anywhere, or this one: the address of its
# ``TensorImpl``, whose place among what is noted is its handle.
_NONE, _ANYWHERE = range(2)
# Where the addresses stand of what is noted, and of objects: ``CompiledPremises._words``.
_LISTS, _STATE, _PARAMS, _FACTS, _WRITTEN, _TO_USE = range(0, 6 * _WORD, _WORD)
_NO_GRADIENT, _KEY, _LIST_TYPE = range(6 * _WORD, 9 * _WORD, _WORD)
# Where they stand of one parameter: its handle, what gradient is expected, the places of that among
# ``HeldGradients`` and of its address in a step's columns, both in bytes, and addresses of what is
# read of the parameter and its state.
_HANDLE, _EXPECTED, _HELD, _COLUMN, _MEMORY = range(0, 5 * _WORD, _WORD)
_ADDRESSES = 11
_PARAM_BYTES = _MEMORY + _ADDRESSES * _WORD
# A backward has evicted all that is read: some 25 cache lines of a parameter, most of which are
# found by way of another. So what is known is asked for early, then the gradient, then all is
# looked at: each for the parameter that is so far behind. 4 and 8 parameters do nearly as well.
_AHEAD_BYTES = 2 * _PARAM_BYTES
_ANY_VALUE = 0
_DICTS = dict, defaultdict
_PARAMS_KEY = "params"  # of a group
# Words to use: those of ``has_facts``, for ``dict_next``, for the address of a tensor's data, and
# where memory that nobody writes starts and ends: the last in which a gradient was.
_SCRATCH, _POINTER, _GAP = (_WORD * (FOUND_WORDS + words) for words in (0, 3, 4))
_WORDS_TO_USE = FOUND_WORDS + 6
_END_OF_MEMORY = (1 << 63) - 1


class HeldGradients:
    """Tensors as C++ has them in memory, to be assigned the gradients of a step.

    Attributes:
        address: Of one that stands for no tensor, which the others follow.

    Args:
        gradients: How many there are.
    """

    def __init__(self, gradients: int) -> None:
        self._words = np.full(1 + gradients, NO_GRADIENT)
        self.address = self._words.ctypes.data

    def let_go(self) -> None:
        """Has all stand for no tensor."""
        _let_go_of_all(self.address, len(self._words))

    def __del__(self) -> None:
        self.let_go()


class CompiledPremises:
    """All that a plan depends on, noted for compiled code.

    Attributes:
        reached: The parameters that had a gradient.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state, of all parameters that have a gradient.
        written: Starts and ends of the memory that updates write, by address: no gradient may be
            there.
        places: For each gradient, where in a step's columns its address goes.
        in_flat: Which of the parameters that have a gradient, counted from 0, must have it where it
            is, in memory that the optimizer keeps; others may have another one of the same kind.
        buffers: The names of what an update takes of state, for each of them.

    Raises:
        TypeError: If it takes Python to read something: a tensor of a class of somebody else's, a
            state that is no dict, a parameter that keeps no versions or is complex.
        KeyError: If a tensor's dtype or device is none that is known here.
    """

    def __init__(
        self,
        groups: Groups,
        state: State,
        written: tuple[Int64s, Int64s],
        places: Sequence[int],
        in_flat: Sequence[int],
        buffers: Sequence[Sequence[str]],
    ) -> None:
        params = [param for group in groups for param in group["params"]]
        grads = [param.grad for param in params]  # read once: other threads may change them
        reached = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        _check_readable(state, reached)
        lists = [[len(group["params"]), *map(id, group["params"])] for group in groups]
        # One without elements is nowhere.
        flat = {id(reached[place]) for place in in_flat if reached[place].numel()}
        noted: list[list[int]] = []
        facts: list[Iterator[int]] = []
        for param, grad in zip(params, grads, strict=True):
            if grad is None:
                noted.append([handle_of(param), _NONE, *[0] * (2 + _ADDRESSES)])
                continue
            expected = grad._cdata if id(param) in flat else _ANYWHERE
            index, of_param = len(facts), state[param]
            where = [_WORD * (1 + index), _WORD * int(places[index])]
            noted.append([handle_of(param), expected, *where, *_memory_read(param, of_param)])
            facts.append(_note_facts(param, grad, of_param, expected, buffers[index]))
        self.reached = reached
        self._kept = (
            params,
            [grads[place] for place, param in enumerate(params) if id(param) in flat],
            list(state.items()),
            [list(state[each].items()) for each in reached],
        )
        self._gradients = len(reached)
        self._handles = _words(map(handle_of, reached))
        self._parts = (
            _words([len(lists), *chain.from_iterable(lists)]),
            _words(_note_dict(state)),
            _words([len(params), *chain.from_iterable(noted)]),
            _words(chain.from_iterable(facts)),
            np.concatenate([[len(written[0])], *written]),
            np.zeros(_WORDS_TO_USE, np.int64),
        )
        addresses = (part.ctypes.data for part in self._parts)
        self._words = _words([*addresses, NO_GRADIENT, id(_PARAMS_KEY), id(list)])
        self._address, self._address_of_handles = self._words.ctypes.data, self._handles.ctypes.data

    def hold_gradients(self, groups: Groups, state: State, memory: StepMemory) -> bool:
        """As in ``Premises``."""
        if type(state) not in _DICTS:
            return False
        if memory.held is None:
            memory.held = HeldGradients(self._gradients)
        held = memory.held.address
        return bool(_hold_gradients(self._address, id(groups), id(state), held, memory.address))

    def let_go(self, memory: StepMemory) -> None:
        """As in ``Premises``."""
        memory.held.let_go()

    def bump_versions(self) -> None:
        """Tells autograd that the parameters have changed."""
        _bump_versions(self._address_of_handles, self._gradients)


def _words(numbers: Iterable[int]) -> Int64s:
    return np.fromiter(numbers, np.int64)


def _check_readable(state: State, reached: Sequence[torch.Tensor]) -> None:
    states = [state[param] for param in reached]
    if type(state) not in _DICTS or any(type(each) is not dict for each in states):
        raise TypeError("compiled code takes state in dicts")
    if any(param.is_inference() or param.is_complex() for param in reached):
        raise TypeError("compiled code takes real parameters that keep versions")


def _memory_read(param: torch.Tensor, of_param: dict[str, torch.Tensor]) -> list[int]:
    """Where the memory is that is read of a parameter and its state: at most two lines at each."""
    return [
        *memory_of(param),
        memory_of_gradient(param),
        *memory_of_dict(of_param),
        *memory_of(of_param["square_avg"]),
    ]


def _note_facts(
    param: torch.Tensor,
    grad: torch.Tensor,
    of_param: dict[str, torch.Tensor],
    expected: int,
    buffers: Sequence[str],
) -> Iterator[int]:
    handle_of(grad)  # which is of torch's own class
    yield from facts_of(param, param.data_ptr())
    yield id(of_param)
    yield from _note_dict(of_param, STATE)
    yield len(buffers)
    for buffer in map(of_param.__getitem__, buffers):
        yield handle_of(buffer)
        yield from facts_of(buffer, buffer.data_ptr())
    yield grad.data_ptr()
    yield grad.nbytes
    yield from device_of(grad)
    yield from facts_of(grad, ANYWHERE if expected == _ANYWHERE else grad.data_ptr())


def _note_dict(dictionary: dict[Any, Any], names: Collection[str] | None = None) -> Iterator[int]:
    """Its size, and each key and value; of other keys than ``names`` no value."""
    yield len(dictionary)
    for key, value in dictionary.items():
        yield id(key)
        yield id(value) if names is None or key in names else _ANY_VALUE


@part
def _same_lists(groups: int, noted: int, key: int, list_type: int) -> bool:
    """Whether groups have lists of objects as noted: how many, then each one's size and items."""
    if type_of(groups) != list_type or list_size(groups) != atomic_load(noted):
        return False
    for index in range(list_size(groups)):
        noted += _WORD
        items = dict_item(list_item(groups, index), key)
        if items == 0 or type_of(items) != list_type or list_size(items) != atomic_load(noted):
            return False
        for place in range(list_size(items)):
            noted += _WORD
            if list_item(items, place) != atomic_load(noted):
                return False
    return True


@part
def _same_dict(dictionary: int, noted: int, scratch: int) -> bool:
    """Whether a dict is as ``_note_dict`` noted, in the same order."""
    if dict_size(dictionary) != atomic_load(noted):
        return False
    plain_store(scratch, 0)
    for _ in range(atomic_load(noted)):
        dict_next(dictionary, scratch, scratch + _WORD, scratch + 2 * _WORD)
        key, value = atomic_load(noted + _WORD), atomic_load(noted + 2 * _WORD)
        if atomic_load(scratch + _WORD) != key:
            return False
        if value != _ANY_VALUE and atomic_load(scratch + 2 * _WORD) != value:
            return False
        noted += 2 * _WORD
    return True


@part
def _after_dict(noted: int) -> int:
    items: int = atomic_load(noted)
    return noted + _WORD + 2 * _WORD * items


@part
def _after_param(param: int, noted: int, to_use: int) -> int:
    """The address after a parameter's facts and state; 0 if they are not as noted."""
    scratch, pointer = to_use + _SCRATCH, to_use + _POINTER
    if is_negated(param) != 0 or not has_facts(param, noted, pointer, to_use):
        return 0
    noted = after_facts(noted)
    if not _same_dict(atomic_load(noted), noted + _WORD, scratch):
        return 0
    noted = _after_dict(noted + _WORD)
    buffers = atomic_load(noted)
    noted += _WORD
    for _ in range(buffers):
        if not has_facts(atomic_load(noted), noted + _WORD, pointer, to_use):
            return 0
        noted = after_facts(noted + _WORD)
    return noted


@part
def _is_apart(start: int, size: int, written: int, gap: int) -> bool:
    """Whether memory is apart from spans: how many, then their starts, in order, and ends.

    Mostly it is between the same two as the last that was: where that is, is kept at ``gap``.
    """
    stop = start + size
    if atomic_load(gap) <= start and stop <= atomic_load(gap + _WORD):
        return True
    spans = atomic_load(written)
    # The span that matters is the last that starts before the memory ends.
    first, end = 0, spans
    while first < end:
        middle = (first + end) // 2
        if atomic_load(written + _WORD * (1 + middle)) < stop:
            first = middle + 1
        else:
            end = middle
    before = atomic_load(written + _WORD * (spans + first)) if first > 0 else 0
    if before > start:
        return False
    after = atomic_load(written + _WORD * (1 + first)) if first < spans else _END_OF_MEMORY
    plain_store(gap, before)
    plain_store(gap + _WORD, after)
    return True


@part
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
        if not _is_apart(address, atomic_load(noted + _WORD), written, to_use + _GAP):
            return False
        plain_store(noted, address)  # which need not be looked for again
    return True


@part
def _ask_for(address: int, lines: int) -> None:
    """Asks for cache lines from an address on."""
    for line in range(lines):
        prefetch(address + line * _CACHE_LINE)


@part
def _ask_for_memory(param: int) -> None:
    for place in range(_ADDRESSES):
        _ask_for(atomic_load(param + _MEMORY + place * _WORD), 2)


@part
def _take_gradient(param: int, gradients: int, no_gradient: int) -> bool:
    """Holds a parameter's gradient that may be any; whether there is one, or none, as expected."""
    impl = atomic_load(atomic_load(param + _HANDLE))
    grad = gradient_of(impl)
    expected, found = atomic_load(param + _EXPECTED), atomic_load(grad)
    if expected == _NONE or found == no_gradient:
        return bool(expected == _NONE and found == no_gradient)
    _ask_for(found, TENSOR_LINES)
    if expected != _ANYWHERE:
        # In flat memory there is a gradient of zero of what has been frozen: that is to be dropped.
        return bool(found == expected and requires_gradient(impl) != 0)
    # Held before it is looked at, as Python does: other threads may drop it.
    return bool(assign(grad, gradients + atomic_load(param + _HELD)) == 0)


@part
def _after_checked(param: int, noted: int, gradients: int, columns: int, premises: int) -> int:
    """The address after a parameter's facts; 0 if it, its state or gradient is not as noted."""
    handle, expected = atomic_load(param + _HANDLE), atomic_load(param + _EXPECTED)
    if expected == _NONE:
        return noted
    grad = gradients + atomic_load(param + _HELD) if expected == _ANYWHERE else param + _EXPECTED
    to_use, written = atomic_load(premises + _TO_USE), atomic_load(premises + _WRITTEN)
    noted = _after_param(handle, noted, to_use)
    pointer = columns + atomic_load(param + _COLUMN)
    if noted == 0 or not _is_usable(grad, noted, written, pointer, to_use):
        return 0
    return after_facts(noted + 4 * _WORD)


@with_the_gil(types.int64(*[types.int64] * 5))
def _hold_gradients(
    premises: int,  # address of where all is noted: ``CompiledPremises._words``
    groups: int,  # Python's object
    state: int,  # the same
    gradients: int,  # ``HeldGradients.address``
    columns: int,  # address of ``StepMemory.columns``
) -> int:
    """1 if all is as noted; if it is not, some gradients may be held all the same."""
    key, list_type = atomic_load(premises + _KEY), atomic_load(premises + _LIST_TYPE)
    if not _same_lists(groups, atomic_load(premises + _LISTS), key, list_type):
        return 0
    scratch = atomic_load(premises + _TO_USE) + _SCRATCH
    if not _same_dict(state, atomic_load(premises + _STATE), scratch):
        return 0
    no_gradient = atomic_load(premises + _NO_GRADIENT)
    facts, params = atomic_load(premises + _FACTS), atomic_load(premises + _PARAMS)
    first = params + _WORD
    end = first + atomic_load(params) * _PARAM_BYTES
    for newest in range(first, end + 2 * _AHEAD_BYTES, _PARAM_BYTES):
        param = newest
        if param < end:
            _ask_for_memory(param)
        param -= _AHEAD_BYTES
        if first <= param < end and not _take_gradient(param, gradients, no_gradient):
            return 0
        param -= _AHEAD_BYTES
        if first <= param:
            facts = _after_checked(param, facts, gradients, columns, premises)
            if facts == 0:
                return 0
    return 1


@with_the_gil(types.int64(*[types.int64] * 2))
def _let_go_of_all(none: int, words: int) -> int:
    for place in range(1, words):
        assign(none, none + place * _WORD)
    return 0


@with_the_gil(types.int64(*[types.int64] * 2))
def _bump_versions(handles: int, count: int) -> int:
    for place in range(count):
        bump_version(atomic_load(handles + place * _WORD))
    return 0
