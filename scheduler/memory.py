"""Memory for what is shared, and tensors over parts of it that are saved as what they are."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

# Bytes of a cache line, and what torch aligns its own memory to.
_ALIGNMENT = 64

# What was allocated on the CPU, by address. A tensor that is moved to shared memory lets go of its
# memory at once; this one lasts as long as anything uses it, such as a ``state_dict`` of before.
_allocated: WeakValueDictionary[int, npt.NDArray[np.uint8]] = WeakValueDictionary()


def allocate_zeros(
    what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of zeros, whatever torch's default device and dtype, and in inference mode too.

    Args:
        what: What errors call it, such as ``"ms"``.
        shape: Its shape.
        dtype: Its dtype.
        device: Where it is to lie.

    Raises:
        MemoryError: If it does not fit; the message says how much was asked, and where.
    """
    with torch.inference_mode(False):
        asked = math.prod(shape) * dtype.itemsize
        try:
            if device.type == "cpu" and asked:
                return _allocate_on_cpu(asked).view(dtype).view(shape)
            return torch.zeros(shape, dtype=dtype, device=device)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            raise MemoryError(f"{what} needs {asked:,} bytes on {device}{_free(device)}") from error


def _allocate_on_cpu(size: int) -> torch.Tensor:
    """Bytes of 0, in huge pages where Linux gives them to who asks, as NumPy does.

    Rows of a large table are each in another page. With small ones, most of an update's time would
    go into finding where they are.
    """
    allocated = np.empty(size + _ALIGNMENT, np.uint8)
    start = -allocated.ctypes.data % _ALIGNMENT
    memory = allocated[start : start + size]
    memory.fill(0)
    _allocated[memory.ctypes.data] = memory
    return torch.from_numpy(memory)


def save_parts_alone(module: torch.nn.Module) -> None:
    """Has a module's ``state_dict`` hold tensors that are saved as what they are.

    ``torch.save`` writes all the memory that a view is part of, and safetensors refuses views that
    share it. So where a parameter is part of shared memory, the ``state_dict`` gets another tensor
    over the same bytes, to which they are all that there is. Writes to it are the parameter's.

    A parameter that has memory of its own, as in a deep copy, stays what it is there.
    """
    for each in module.modules():
        if each._parameters:
            _add_hook(each, _set_parts_alone)
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(module.parameters())):
        _add_hook(module, _join_tied)


def _add_hook(module: torch.nn.Module, hook: Any) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        return  # it takes no hooks, and its parameters are saved as views
    if hook not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(hook)


def _set_parts_alone(
    module: torch.nn.Module, state_dict: MutableMapping[str, Any], prefix: str, _: Any
) -> None:
    """A module's hook: replaces its own parameters; those of modules in it have theirs."""
    for name, parameter in module._parameters.items():
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and value is not parameter:  # and not with keep_vars
            state_dict[prefix + name] = _part_alone(value)


def _join_tied(
    module: torch.nn.Module, state_dict: MutableMapping[str, Any], prefix: str, _: Any
) -> None:
    """A module's hook: what is tied in it is one tensor again, and saved once."""
    joined: dict[tuple[Any, ...], Any] = {}
    for name, value in state_dict.items():
        if name.startswith(prefix) and isinstance(value, torch.Tensor) and value.numel():
            same = value.data_ptr(), value.dtype, value.shape, value.stride()
            state_dict[name] = joined.setdefault(same, value)


def _part_alone(value: torch.Tensor) -> torch.Tensor:
    """A tensor over the same bytes as a view, to which they are all; or the same, if it has to be.

    That is one in memory that torch may yet free to move it.
    """
    storage = value.untyped_storage()
    if storage.nbytes() == value.nbytes:
        return value
    if value.numel() == 0:
        return value.clone()
    memory = _allocated.get(storage.data_ptr())
    if memory is not None:  # which outlasts the storage
        owner = torch.from_numpy(memory).view(value.dtype)
        value = owner.as_strided(value.size(), value.stride(), value.storage_offset())
    elif not value.is_shared():
        return value
    return from_dlpack(value)


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return ", more than it can give"
    free, total = torch.cuda.mem_get_info(device)
    return f", of whose {total:,} bytes {free:,} are free"
