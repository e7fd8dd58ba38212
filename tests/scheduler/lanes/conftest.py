"""What tests of CUDA lanes share, on a GPU and on the driver of tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # else tests of CPU lanes would need Triton
    from gpu_testing import Gpu
    from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph


@pytest.fixture(params=["driver of tests", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """A device that lanes take for a GPU, or one."""
    from gpu_testing import open_gpu

    with open_gpu(request.param) as gpu:
        yield gpu


@pytest.fixture
def graphs() -> Iterator[list[UpdateGraph]]:
    """The graphs that were made."""
    from gpu_testing import graphs_made

    with graphs_made() as made:
        yield made
