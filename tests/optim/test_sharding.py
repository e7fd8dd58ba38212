"""Distributed parameters: FSDP, tensor parallel, checkpoints, over two processes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from process_testing import LIMIT_SECONDS

pytest.importorskip("torch.distributed.fsdp", reason="torch has no distributed package here")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo here", allow_module_level=True)

from hogstream.optim import RMSprop
from sharding_checks import (
    CHECKS,
    OPTIONS,
    PROCESSES,
    assert_follows,
    load,
    model_of,
    run_checks,
    save,
    train,
    trained_in_one_process,
    values_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes have left: a file for each check and process, and checkpoints."""
    folder = tmp_path_factory.mktemp("sharding")
    model = model_of()
    optimizer = RMSprop(model.parameters(), **OPTIONS)
    train(model, optimizer, range(3))
    save(model, optimizer, folder / "by one")
    context = spawn(run_checks, (folder,), PROCESSES, join=False)
    assert context is not None
    try:
        # Each join ends with a process, or raises what one of them has raised.
        finished = any(context.join(LIMIT_SECONDS) for _ in range(PROCESSES))
    finally:
        for process in context.processes:
            process.kill()
    assert finished, "a check hangs"
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check, folder):
    results = [(folder / f"{check}.{rank}").read_text() for rank in range(PROCESSES)]
    assert results == ["right"] * PROCESSES, "\n".join(results)


def test_one_process_loads_what_two_have_saved(folder):
    model = model_of(seed=1)
    optimizer = RMSprop(model.parameters(), **OPTIONS)
    load(model, optimizer, folder / "by two")
    train(model, optimizer, range(3, 5))
    assert_follows(values_of(model, optimizer), trained_in_one_process(range(5)))
