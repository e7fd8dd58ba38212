"""Where shared parameters lie: in whatever mode torch is, moved as a whole, and saved in parts."""

from __future__ import annotations

import copy
import gc
import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model

from hogstream.scheduler import (
    ProcessScheduler,
    SharedParameters,
    StreamScheduler,
    load_checkpoint,
    save_checkpoint,
)
from hogstream.scheduler.lanes.process_lock import ProcessLock
from scheduler_testing import COUNTING, submit_ones


def make_module() -> torch.nn.Sequential:
    """A small layer, a large one, and one without elements."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 4), torch.nn.Linear(4, 512), torch.nn.Linear(3, 2)
    module = torch.nn.Sequential(*layers)
    module[2].weight = torch.nn.Parameter(torch.zeros(0, 3))
    return module


def tie(module: torch.nn.Sequential) -> torch.nn.Sequential:
    """The same with a layer that has the first one's weight."""
    module.append(torch.nn.Linear(16, 4))
    module[3].weight = module[0].weight
    return module


def saved_bytes(thing: Any) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


FATES = ("attached", "attached again", "moved", "moved by torch", "copied")


def meet(fate: str, module: torch.nn.Sequential, shared: SharedParameters) -> torch.nn.Sequential:
    """What may become of a module after it was attached; returns the one that is saved then."""
    if fate == "attached again":
        shared.attach(module)
    elif fate == "moved":
        shared.share_memory_(1)
    elif fate == "moved by torch":
        module.share_memory()
    return copy.deepcopy(module) if fate == "copied" else module


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("tied", [False, True])
def test_module_is_saved_as_one_that_is_not_shared(fate: str, tied: bool, tmp_path: Path) -> None:
    plain = tie(make_module()) if tied else make_module()
    module = copy.deepcopy(plain)
    module = meet(fate, module, SharedParameters.from_module(module))
    assert module.state_dict().keys() == plain.state_dict().keys()
    for mine, own in ((module, plain), *zip(module.children(), plain.children(), strict=True)):
        assert saved_bytes(mine.state_dict()) == saved_bytes(own.state_dict())
    for each in (module, plain):
        save_model(each, str(tmp_path / "model"))
        loaded = load_file(tmp_path / "model")
        assert sum(tensor.nbytes for tensor in loaded.values()) == saved_bytes_of(plain)
        fresh = tie(make_module()) if tied else make_module()
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        load_model(fresh, str(tmp_path / "model"))
        for name, parameter in fresh.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name))


def saved_bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize("fate", ["attached", "moved"])
def test_state_dict_is_the_memory_that_workers_update(fate: str) -> None:
    module = make_module()
    shared = SharedParameters.from_module(module)
    module = meet(fate, module, shared)
    state = module.state_dict()
    shared.flat.fill_(2.0)
    assert all(value.eq(2.0).all() for value in state.values())
    state["1.weight"].fill_(3.0)
    assert shared.views["1.weight"].eq(3.0).all()
    assert module.state_dict(keep_vars=True)["1.weight"] is module[1].weight


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_large_tables_may_have_huge_pages() -> None:
    """NumPy asks for them from 4 MiB on, and torch does not."""
    shared = SharedParameters.from_module(torch.nn.Embedding(1 << 16, 32))
    for tensor in (shared.flat, shared.ms):
        assert tensor.data_ptr() % 64 == 0
        assert "hg" in flags_of_memory_at(tensor.data_ptr() + tensor.nbytes // 2)


def flags_of_memory_at(address: int) -> list[str]:
    """What Linux says of the mapping that has an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *flags = line.split()
        if not first.endswith(":"):
            start, end = (int(each, 16) for each in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return flags
    raise ValueError(f"nothing is mapped at {address:#x}")


def test_state_dict_from_before_a_move_keeps_what_it_had() -> None:
    """It must not become memory that was freed."""
    module = make_module()
    shared = SharedParameters.from_module(module)
    shared.flat.fill_(2.0)
    state = module.state_dict()
    shared.share_memory_(1)
    shared.flat.fill_(5.0)
    assert [torch.empty(1 << 10).fill_(7.0) for _ in range(64)]  # would be given such memory
    assert all(value.eq(2.0).all() for value in state.values())
    assert all(parameter.eq(5.0).all() for parameter in module.parameters())


def test_attached_module_may_be_pickled() -> None:
    module = make_module()
    SharedParameters.from_module(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, module.get_parameter(name))


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "meta by default": lambda: default_device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@pytest.mark.parametrize("mode", MODES)
async def test_all_is_made_where_and_as_it_belongs_in_any_mode(
    mode: str, backend: str, tmp_path: Path
) -> None:
    """Made and used in the mode, and used outside of it."""
    given = {"w": torch.zeros(6)}
    module = torch.nn.Linear(2, 3)
    telemetry = {"telemetry": True} if backend == "numba" else {}
    settings = {**COUNTING, **telemetry, "backend": backend, "workers": 2}
    settings |= {"state": "per-worker", "read": "snapshot"}

    async def train(shared: SharedParameters) -> None:
        async with StreamScheduler(shared, **settings) as scheduler:
            await scheduler.run(submit_ones(shared), updates=4)

    with MODES[mode]():
        shared = SharedParameters(given)
        attached = SharedParameters.from_module(module)
        for each in (shared, attached):
            each.make_state()
            each.make_worker_state(2)
        await train(shared)
        save_checkpoint(tmp_path / "in", shared, generators={"g": torch.Generator("cpu")})
        load_checkpoint(tmp_path / "in", shared)
        shared.share_memory_(2)
        lock = ProcessLock()
        assert lock.acquire(1.0)
        state = module.state_dict()
    lock.release()
    await train(shared)
    save_checkpoint(tmp_path / "out", shared)
    load_checkpoint(tmp_path / "out", shared)
    assert shared.version == 8
    assert shared.worker_ms is not None
    assert shared.worker_state is not None
    tensors = shared.flat, *shared.state.named().values(), *shared.worker_state.named().values()
    assert len(tensors) == 7
    for tensor in tensors:
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
    attached.flat.fill_(2.0)
    module(torch.ones(2)).sum().backward()
    assert module.weight.grad is not None
    assert state["weight"].eq(2.0).all()


def test_parameters_without_elements_are_shared() -> None:
    shared = SharedParameters({"none": torch.zeros(0, 3, dtype=torch.bfloat16)})
    shared.share_memory_(1)
    assert shared.make_worker_ms(2).shape == (2, 0)
    assert shared.views["none"].shape == (0, 3)


def test_module_made_in_inference_mode_is_refused_and_left_alone() -> None:
    with torch.inference_mode():
        module = torch.nn.Linear(2, 3)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=r"weight must not be an inference tensor"):
        SharedParameters.from_module(module)
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    with torch.inference_mode():
        assert module(torch.ones(2)).shape == (3,)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As with a ``/dev/shm`` that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def so_many_more_files(number: int) -> Iterator[None]:
    """As in a process that has nearly as many files open as it may."""
    gc.collect()  # which would close some later
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 16, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(number):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in taken:
            os.close(each)


ELEMENTS = 1 << 16
# A tensor of bfloat16 has room, one of float32 has none; or the first two have file descriptors.
SHORTAGES: dict[str, Callable[[], Any]] = {
    "room": lambda: files_of_at_most(3 * ELEMENTS),
    "file descriptors": lambda: so_many_more_files(2),
}


@pytest.mark.parametrize("shortage", SHORTAGES)
@pytest.mark.parametrize("step", ["share_memory_", "open"])
async def test_move_that_fails_has_changed_nothing(shortage: str, step: str, backend: str) -> None:
    module = torch.nn.Linear(ELEMENTS, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(module.weight)
    shared = SharedParameters.from_module(module)
    scheduler = ProcessScheduler(shared, processes=2, state="per-worker", telemetry=True)
    tensors = shared.flat, shared.ms, shared.versions
    addresses = [tensor.data_ptr() for tensor in tensors]

    async def move() -> None:
        if step == "open":
            await scheduler.__aenter__()
        else:
            shared.share_memory_(2)

    with SHORTAGES[shortage](), pytest.raises((RuntimeError, OSError)):
        await move()
    assert [tensor.data_ptr() for tensor in (shared.flat, shared.ms, shared.versions)] == addresses
    assert not any(tensor.is_shared() for tensor in tensors)
    assert (shared.users, shared.worker_ms, shared.races) == (0, None, None)

    settings = {**COUNTING, "backend": backend, "workers": 1}
    async with StreamScheduler(shared, **settings) as alone:
        await alone.run(submit_ones(shared), updates=3)
    assert shared.version == 3
    shared.share_memory_(2)
    async with StreamScheduler(shared, **settings) as alone:
        await alone.run(submit_ones(shared), updates=3)
    assert shared.versions.tolist() == [6, 0, 0]
    assert module.weight.eq(-6).all()


@pytest.mark.parametrize("state", [{"state": "shared"}, {"state": "per-worker"}], ids=str)
@pytest.mark.parametrize("kind", [StreamScheduler, ProcessScheduler])
async def test_scheduler_that_does_not_open_leaves_no_state_behind(kind: Any, state: Any) -> None:
    """Another number of workers have their buffers already."""
    shared = SharedParameters({"w": torch.zeros(64)}, {"b": torch.zeros(1)})
    shared.make_worker_buffers(3)
    settings = {"telemetry": True, "workers": 2, "backend": "numba", "centered": True, **state}
    settings["buffers"] = "worker"
    if kind is ProcessScheduler:
        settings["processes"] = 2
    with pytest.raises(ValueError, match="workers must be 3, as many as have buffers"):
        await kind(shared, **settings).__aenter__()
    assert shared.worker_state is None
    assert shared.grad_avg is None
    assert shared.races is None
    assert shared.row_versions is None
    assert not shared.flat.is_shared()
    assert len(shared.make_worker_state(3).ms) == 3


async def test_parameters_stay_while_a_scheduler_is_open_over_them() -> None:
    shared = SharedParameters({"w": torch.zeros(8)})
    async with StreamScheduler(shared, workers=1):
        with pytest.raises(RuntimeError, match="must not move while a scheduler is open over it"):
            shared.share_memory_(1)
        with pytest.raises(RuntimeError, match="must not move while a scheduler is open over it"):
            await ProcessScheduler(shared, processes=1).__aenter__()
    shared.share_memory_(1)
