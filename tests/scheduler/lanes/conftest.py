"""What tests of CUDA lanes share, on a GPU and on the driver of tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # else tests of CPU lanes would need Triton
    from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph


@pytest.fixture
def graphs() -> Iterator[list[UpdateGraph]]:
    """The graphs that were made."""
    from gpu_testing import graphs_made

    with graphs_made() as made:
        yield made
