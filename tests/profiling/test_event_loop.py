"""The event loop of measurements."""

from __future__ import annotations

import asyncio
import json

import pytest

from hogstream.profiling.event_loop import EVENT_LOOP, run
from process_testing import run_python


def test_it_is_uvloop_where_that_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> type[asyncio.AbstractEventLoop]:
        return type(asyncio.get_running_loop())

    assert run(main()) is uvloop.Loop
    assert f"uvloop {uvloop.__version__}" == EVENT_LOOP


@pytest.mark.slow
def test_it_is_asyncio_elsewhere() -> None:
    said = run_python(
        "-c",
        "import asyncio, json, sys, torch; sys.modules['uvloop'] = None;"
        "from hogstream.profiling.environment import describe_environment;"
        "from hogstream.profiling.event_loop import run;"
        "print(run(asyncio.sleep(0, 7)));"
        "print(json.dumps(describe_environment(torch.device('cpu'), 'numpy').event_loop))",
    )
    result, event_loop = map(json.loads, said.splitlines())
    assert (result, event_loop) == (7, "asyncio")


def test_tasks_left_over_are_cancelled() -> None:
    left: list[asyncio.Task[None]] = []

    async def main() -> None:
        left.append(asyncio.create_task(asyncio.sleep(3600)))

    run(main())
    assert left[0].cancelled()
