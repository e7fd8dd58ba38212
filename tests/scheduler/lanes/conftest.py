"""What tests of CUDA lanes share, on a GPU and on the driver of tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # else tests of CPU lanes would need Triton
    from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[UpdateGraph]:
    """The graphs that were made."""
    from hogstream.scheduler.lanes.cuda import CudaLanes  # which needs Numba and Triton

    made: list[UpdateGraph] = []
    make = CudaLanes._make_graph

    def noted(*arguments: Any) -> UpdateGraph:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(CudaLanes, "_make_graph", noted)
    return made
