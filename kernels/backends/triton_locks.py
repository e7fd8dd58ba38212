"""Locks of rows in the memory of a GPU: a program holds one at a time, so that none waits for ever.

A program waits in a loop. Whoever holds the lock is under way, as it has taken it, and a GPU takes
no program off before it has ended: so it comes to release it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lock_of(
    row,  # of a table: an int64
    locks,  # address of the first lock: int32, (stripes,)
    first_lock,  # which of them the first row of the table has
    stripes,  # how many there are: a power of 2
):
    """Where the lock of a row is: row after row has the next one, round and round."""
    locks_ptr = locks.to(tl.int64).to(tl.pointer_type(tl.int32))
    return locks_ptr + ((first_lock.to(tl.int64) + row) & (stripes.to(tl.int64) - 1))


@triton.jit
def hold(lock_ptr):
    """Waits for a lock; all threads of the program see what was written under it before."""
    while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") != 0:
        pass
    tl.debug_barrier()


@triton.jit
def release(lock_ptr):
    """Releases a lock, behind all that the threads of the program have written."""
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0, sem="release")
