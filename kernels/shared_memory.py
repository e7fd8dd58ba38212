"""Moving tensors to memory that several processes share."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def move_to_shared_memory(tensors: Iterable[torch.Tensor]) -> None:
    """Moves tensors to where other processes can reach them, with all views of their memory.

    Either all are moved or none, unless somebody else takes the last room meanwhile.

    Args:
        tensors: On a GPU, and in shared memory, they stay where they are.

    Raises:
        RuntimeError: If there is no room, or no file descriptor, for one of them.
    """
    moving = {each.untyped_storage()._cdata: each for each in tensors if not each.is_shared()}
    # None can be moved back: so room for all is taken first.
    sizes = [each.untyped_storage().nbytes() for each in moving.values()]
    room = [torch.empty(size, dtype=torch.uint8, device="cpu").share_memory_() for size in sizes]
    for each in moving.values():
        del room[0]
        each.share_memory_()
