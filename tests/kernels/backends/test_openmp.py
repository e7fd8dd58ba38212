"""Torch's threads are left alone in the child of a fork, which its parent's are not in."""

from __future__ import annotations

import pytest

from process_testing import run_python

# Numba's kernels are loaded when an optimizer is first made: here, in the child.
LOADED_IN_CHILD = """
import os, signal, numpy, torch
{before}
torch.set_num_threads(3)
(torch.ones(1 << 20) * 2).sum()  # on torch's threads
child = os.fork()
if child == 0:
    signal.alarm(30)  # its threads would be waited for
    from hogstream.kernels import rmsprop_

    # Not made by torch, which would wait for them too.
    param, grad, ms = map(torch.from_numpy, numpy.ones((3, 1 << 17), numpy.float32))
    rmsprop_(param, grad, ms, backend="numba")
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("before", ["", "import hogstream.optim"], ids=["nothing", "hogstream"])
def test_a_child_that_loads_the_kernels_itself_may_update(before):
    pytest.importorskip("numba")
    program = LOADED_IN_CHILD.format(before=before)
    assert run_python("-W", "ignore::DeprecationWarning", "-c", program).split() == ["0"]
