"""What ``docs/lock-free.md`` says can't happen, however updates race."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext
from scheduler_testing import COUNTING

#: An update subtracts exactly 1, and leaves an ``ms`` of exactly 1.
# As many as are counted exactly in bfloat16.
UPDATES = 200
N = 1 << 17


async def race(shared: SharedParameters, **settings: Any) -> list[torch.Tensor]:
    """Races updates that count, and returns what workers saw while they did."""
    ones = torch.ones_like(shared.flat)
    seen: list[torch.Tensor] = []

    async def worker(context: WorkerContext) -> None:
        if context.iteration % 5 == 0:
            seen.append(context.flat.clone())
        await context.submit(ones)

    async with StreamScheduler(shared, workers=4, depth=4, **COUNTING, **settings) as scheduler:
        report = await scheduler.run(worker, updates=UPDATES)
    assert report.updates == shared.version == UPDATES
    return seen


@pytest.mark.parametrize("read", ["live", "snapshot"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
async def test_no_element_is_torn(device: str, dtype: torch.dtype, read: str) -> None:
    shared = SharedParameters({"p": torch.zeros(N, dtype=dtype, device=device)})
    seen = await race(shared, read=read)
    for values in [*seen, shared.flat]:
        counts = -values.double()
        assert counts.eq(counts.round()).all()
        assert counts.ge(0).all()
        assert counts.le(UPDATES).all()
    assert shared.flat.le(-1).all()  # the last of an element's updates is there
    assert shared.ms.eq(1).all()


async def test_no_lane_reads_a_product_on_its_way_to_a_mean_square(backend: str) -> None:
    """Which would be 0 with this update, and dividing by its root infinite."""
    shared = SharedParameters({"p": torch.zeros(N)})
    await race(shared, backend=backend)
    assert shared.flat.isfinite().all()
