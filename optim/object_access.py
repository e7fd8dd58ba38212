"""CPython's and torch's own functions, for code that Numba compiles: objects without Python's cost.

All of them are called with the GIL held. A tensor is passed as torch's C interface takes it: as the
address of a word that holds the address of its ``TensorImpl``. There is one in every Python object
of a tensor, and in torch's record of a gradient, of which Python need not have an object yet.

CPython's functions, and those of torch that begin with ``aoti_torch``, are interfaces that are kept
from version to version; the other five are C++ of torch's. Importing this module raises where one
is missing or does not do what is expected of it, which nobody could build on then.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from llvmlite import binding
from numba import types

from hogstream.kernels.backends.numba_atomics import atomic_load, atomic_store, local_bytes
from hogstream.kernels.backends.numba_compile import part

_TORCH = ctypes.CDLL(torch._C.__file__)  # and the libraries that it needs, which have the functions
_I64 = types.int64
_LOW_HALF = 0xFFFFFFFF
_WORD = 8


def _function(library: ctypes.CDLL, name: str, returns: Any, arguments: int) -> Any:
    """A function in C for compiled code, whose arguments are numbers or addresses: int64."""
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    symbol = f"hogstream_{name}"
    binding.add_symbol(symbol, address)
    return types.ExternalFunction(symbol, returns(*[_I64] * arguments))


list_size = _function(ctypes.pythonapi, "PyList_Size", _I64, 1)
list_item = _function(ctypes.pythonapi, "PyList_GetItem", _I64, 2)
dict_size = _function(ctypes.pythonapi, "PyDict_Size", _I64, 1)
# With a key that is an object: the value, or 0.
dict_item = _function(ctypes.pythonapi, "PyDict_GetItem", _I64, 2)
dict_next = _function(ctypes.pythonapi, "PyDict_Next", types.int32, 4)

#: Makes the tensor at the second address the same as the one at the first; 0 if nothing went wrong.
assign = _function(_TORCH, "aoti_torch_assign_tensors", types.int32, 2)
# Each takes a tensor and an address to write to, and returns 0 if nothing went wrong.
_layout = _function(_TORCH, "aoti_torch_get_layout", types.int32, 2)
_numel = _function(_TORCH, "aoti_torch_get_numel", types.int32, 2)
_dtype = _function(_TORCH, "aoti_torch_get_dtype", types.int32, 2)
_device_type = _function(_TORCH, "aoti_torch_get_device_type", types.int32, 2)
_device_index = _function(_TORCH, "aoti_torch_get_device_index", types.int32, 2)
_dim = _function(_TORCH, "aoti_torch_get_dim", types.int32, 2)
_strides = _function(_TORCH, "aoti_torch_get_strides", types.int32, 2)
_data_ptr = _function(_TORCH, "aoti_torch_get_data_ptr", types.int32, 2)

# From the address of a ``TensorImpl`` to its gradient, which is a tensor that may be undefined, and
# to whether it requires one.
_GRADIENT = "_ZNK3c1010TensorImpl4gradEv"
gradient_of = _function(_TORCH, _GRADIENT, _I64, 1)
requires_gradient = _function(_TORCH, "_ZNK3c1010TensorImpl13requires_gradEv", types.uint8, 1)
is_negated = _function(_TORCH, "_ZN2at6native6is_negERKNS_6TensorE", types.uint8, 1)
_version_counter = _function(
    _TORCH, "_ZN5torch8autograd4impl15version_counterERKN2at6TensorE", _I64, 1
)
_bump_version = _function(
    _TORCH, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", types.void, 1
)


def _number(name: str) -> int:
    return int(getattr(_TORCH, name)()) & _LOW_HALF


_STRIDED = _number("aoti_torch_layout_strided")
_DTYPES = {
    torch.float16: _number("aoti_torch_dtype_float16"),
    torch.bfloat16: _number("aoti_torch_dtype_bfloat16"),
    torch.float32: _number("aoti_torch_dtype_float32"),
    torch.float64: _number("aoti_torch_dtype_float64"),
}
_DEVICES = {
    "cpu": _number("aoti_torch_device_type_cpu"),
    "cuda": _number("aoti_torch_device_type_cuda"),
}
#: ``facts_of`` with this address are those of a tensor wherever it is.
ANYWHERE = -1
#: How many words ``has_facts`` and the like use.
FOUND_WORDS = 6
#: How many cache lines a ``TensorImpl`` of torch's is in, as long as it has up to five dimensions.
TENSOR_LINES = 4
# Where in a dict the address of its keys is. That memory is asked for and no more: where it is
# elsewhere, in vain.
_PLACE_OF_KEYS = object.__basicsize__ + 2 * _WORD


def handle_of(tensor: torch.Tensor) -> int:
    """The tensor as compiled code takes it, for as long as Python's object of it lives.

    Raises:
        TypeError: If it is of a class of somebody else's.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"compiled code takes torch's own tensors, got a {type(tensor).__name__}")
    return id(tensor) + _PLACE_OF_IMPL


def facts_of(tensor: torch.Tensor, address: int) -> list[int]:
    """What ``has_facts`` compares.

    Args:
        tensor: Dense; float16, bfloat16, float32 or float64.
        address: Where its data must be, or ``ANYWHERE``.

    Returns:
        As many numbers as the tensor has dimensions, and four.

    Raises:
        KeyError: If it is of another dtype.
    """
    return [address, tensor.numel(), _DTYPES[tensor.dtype], tensor.dim(), *tensor.stride()]


def device_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What ``is_on_device`` compares.

    Raises:
        KeyError: If it is neither on the CPU nor on a GPU.
    """
    device = tensor.device
    index = -1 if device.index is None else device.index
    return _DEVICES[device.type], index & _LOW_HALF


def memory_of(tensor: torch.Tensor) -> list[int]:
    """Where what compiled code reads of a tensor is, at most two cache lines at each address."""
    impl = tensor._cdata
    return [handle_of(tensor), impl, impl + 128, tensor.untyped_storage()._cdata]


def memory_of_gradient(tensor: torch.Tensor) -> int:
    """Where torch's record of a tensor's gradient is."""
    record: int = _record_of_gradient(tensor._cdata)
    return record


def memory_of_dict(dictionary: dict[Any, Any]) -> list[int]:
    """The same as ``memory_of`` of a dict of few items."""
    address = id(dictionary)
    return [address, ctypes.c_int64.from_address(address + _PLACE_OF_KEYS).value]


@part
def type_of(an_object: int) -> int:
    """The address of an object's type, which follows the count of its references."""
    address: int = atomic_load(an_object + _WORD)
    return address


@part
def data_pointer_of(tensor: int) -> int:
    """Where a tensor's data are; 0 if that cannot be told."""
    pointer = local_bytes(_WORD)
    atomic_store(pointer, 0)
    _data_ptr(tensor, pointer)
    address: int = atomic_load(pointer)
    return address


@part
def after_facts(facts: int) -> int:
    """The address that follows facts."""
    dimensions: int = atomic_load(facts + 3 * _WORD)
    return facts + _WORD * (4 + dimensions)


@part
def has_facts(tensor: int, facts: int, pointer: int, found: int) -> bool:
    """Whether a strided tensor is as was noted of another: then they are, where their data are.

    Args:
        tensor: As ``handle_of`` gives it.
        facts: Address of what ``facts_of`` gave.
        pointer: Address to which the address of the tensor's data is written.
        found: Address of ``FOUND_WORDS`` words of zero, for this module alone: some functions write
            half a word.
    """
    failed = _numel(tensor, found) | _dtype(tensor, found + _WORD) | _dim(tensor, found + 2 * _WORD)
    if failed != 0 or not _same_words(found, facts + _WORD, 3):
        return False
    if _strides(tensor, pointer) != 0:
        return False
    if not _same_words(atomic_load(pointer), facts + 4 * _WORD, atomic_load(found + 2 * _WORD)):
        return False
    if _data_ptr(tensor, pointer) != 0:
        return False
    address, expected = atomic_load(pointer), atomic_load(facts)
    if expected != ANYWHERE:
        return bool(address == expected)
    return bool(address != 0 or atomic_load(found) == 0)  # elements, that is


@part
def is_strided(tensor: int, found: int) -> bool:
    """Whether a tensor is dense: of another, torch says on the standard error what it lacks."""
    found += 3 * _WORD
    return bool(_layout(tensor, found) == 0 and atomic_load(found) == _STRIDED)


@part
def is_on_device(tensor: int, device: int, found: int) -> bool:
    """Whether a tensor is where another was, of which ``device_of`` is at an address."""
    found += 4 * _WORD
    failed = _device_type(tensor, found) | _device_index(tensor, found + _WORD)
    return bool(failed == 0 and _same_words(found, device, 2))


@part
def _same_words(one: int, other: int, words: int) -> bool:
    """Whether so many words at two addresses are the same."""
    for word in range(words):
        if atomic_load(one + word * _WORD) != atomic_load(other + word * _WORD):
            return False
    return True


@part
def bump_version(tensor: int) -> None:
    """Tells autograd that a tensor has changed; not one that keeps no versions."""
    if atomic_load(_version_counter(tensor)) != 0:
        _bump_version(tensor)


# As ``gradient_of``, for Python.
_record_of_gradient: Any = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_int64)((_GRADIENT, _TORCH))


def _place_of_impl() -> int:
    """Where in Python's object of a tensor the address of its ``TensorImpl`` is, in bytes."""
    size = torch.Tensor.__basicsize__
    places = set(range(object.__basicsize__, size, _WORD))
    for tensor in (torch.zeros(1), torch.zeros(0).half(), torch.nn.Parameter(torch.zeros(2, 3))):
        words = (ctypes.c_int64 * (size // _WORD)).from_address(id(tensor))
        places &= {place for place in places if words[place // _WORD] == tensor._cdata}
    if len(places) != 1:
        raise ImportError(f"the TensorImpl of a tensor may be at any of {sorted(places)}")
    return places.pop()


def _no_gradient() -> int:
    """The ``TensorImpl`` that stands for a gradient where there is none."""

    def gradient(tensor: torch.Tensor) -> int:
        return ctypes.c_int64.from_address(memory_of_gradient(tensor)).value

    with_gradient = torch.nn.Parameter(torch.zeros(3))
    with_gradient.grad = torch.zeros(3)
    without = {gradient(torch.zeros(1)), gradient(torch.nn.Parameter(torch.zeros(1)))}
    if gradient(with_gradient) != with_gradient.grad._cdata or len(without) != 1:
        raise ImportError("a gradient is not where it is expected")
    return without.pop()


_PLACE_OF_IMPL = _place_of_impl()
#: What the word holds that ``gradient_of`` points to, if there is no gradient.
NO_GRADIENT = _no_gradient()
