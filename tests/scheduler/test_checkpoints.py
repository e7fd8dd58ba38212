from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hogstream.kernels import rmsprop_
from hogstream.scheduler import SharedParameters
from hogstream.scheduler.checkpoints import load_checkpoint, save_checkpoint
from process_testing import may_fork_with_threads, run_to_end
from update_testing import DTYPES, normal

FORK = multiprocessing.get_context("fork")

Tensors = dict[str, torch.Tensor]


def make_shared(seed: int, *, dtype: torch.dtype = torch.float32) -> SharedParameters:
    """Parameters and a state in which no two values are alike."""
    shapes = {"layer.weight": (5, 3), "layer.bias": (5,), "scale": ()}
    shared = SharedParameters(
        {
            name: normal(max(1, int(np.prod(shape))), dtype, seed + place).reshape(shape)
            for place, (name, shape) in enumerate(shapes.items())
        }
    )
    shared.ms.copy_(normal(shared.elements, shared.ms.dtype, seed + 10).abs())
    shared.versions[0] = 1000 + seed
    return shared


def with_all(seed: int, workers: int = 2) -> SharedParameters:
    """The same with all kinds of state, for all and for each worker, and races."""
    shared = make_shared(seed)
    for state in (shared.make_state(), shared.make_worker_state(workers)):
        for place, tensor in enumerate(state.named().values()):
            numbers = normal(tensor.numel(), tensor.dtype, seed + 20 + place)
            tensor.copy_(numbers.view_as(tensor))
    counts = shared.count_races(2).counts
    counts.copy_(torch.arange(counts.numel()).view_as(counts) + seed)
    return shared


def state_of(shared: SharedParameters) -> dict[str, Any]:
    """All that a checkpoint may change, as a copy."""
    races = shared.races
    return {
        "parameters": {name: view.tolist() for name, view in shared.views.items()},
        "state": {name: each.tolist() for name, each in shared.state.named().items()},
        "worker_state": None
        if shared.worker_state is None
        else {name: each.tolist() for name, each in shared.worker_state.named().items()},
        "races": None if races is None else races.counts.tolist(),
        "version": shared.version,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, loaded = make_shared(0, dtype=dtype), make_shared(50, dtype=dtype)
    before = loaded.flat.data_ptr()
    generators = {"data": torch.Generator().manual_seed(3), "noise": torch.Generator()}
    torch.randn(7, generator=generators["data"])
    save_checkpoint(
        tmp_path / "file",
        saved,
        iterations=np.array([4, 0, 7]),
        seeds={"data": 3, "least": -(1 << 63), "most": (1 << 64) - 1},
        generators=generators,
    )
    checkpoint = load_checkpoint(tmp_path / "file", loaded)
    assert state_of(loaded) == state_of(saved)
    assert loaded.flat.data_ptr() == before
    assert checkpoint.version == 1000
    assert checkpoint.iterations == (4, 0, 7)
    assert checkpoint.seeds == {"data": 3, "least": -(1 << 63), "most": (1 << 64) - 1}
    assert checkpoint.generators.keys() == generators.keys()
    for name, generator in generators.items():
        resumed = torch.Generator()
        resumed.set_state(checkpoint.generators[name])
        assert torch.equal(torch.randn(5, generator=resumed), torch.randn(5, generator=generator))


def test_state_of_each_worker_and_races_come_back(tmp_path: Path) -> None:
    saved = with_all(0)
    save_checkpoint(tmp_path / "file", saved, iterations=[5, 6])
    for loaded in (make_shared(50), with_all(50)):
        assert load_checkpoint(tmp_path / "file", loaded).iterations == (5, 6)
        assert state_of(loaded) == state_of(saved)


def test_state_that_was_not_saved_begins_with_zeros(tmp_path: Path) -> None:
    """As the updates before, of an older version say, had none."""
    saved = make_shared(0)
    saved.make_worker_state(2, []).ms.fill_(2)
    save_checkpoint(tmp_path / "file", saved)
    loaded = with_all(50)
    load_checkpoint(tmp_path / "file", loaded)
    assert torch.equal(loaded.ms, saved.ms)
    assert loaded.worker_state is not None
    assert loaded.worker_state.ms.eq(2).all()
    for state in (loaded.state, loaded.worker_state):
        assert state.named().keys() == {"ms", "grad_avg", "momentum_buffer"}
        for kind in ("grad_avg", "momentum_buffer"):
            assert not state.named()[kind].any()


def test_races_of_rows_are_counted_from_zero(tmp_path: Path) -> None:
    shared = SharedParameters({"a": torch.zeros(3, 2), "b": torch.zeros(4)})
    save_checkpoint(tmp_path / "saved", shared)
    shared.count_races_of_rows("a").counts.fill_(3)
    load_checkpoint(tmp_path / "saved", shared)
    assert shared.row_races.keys() == {"a"}
    assert not shared.row_races["a"].counts.any()


def test_races_that_were_not_saved_are_counted_from_zero(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "file", make_shared(0))
    loaded = make_shared(50)
    counts = loaded.count_races(2).counts
    counts.fill_(9)
    load_checkpoint(tmp_path / "file", loaded)
    assert loaded.races is not None
    assert loaded.races.counts is counts
    assert not counts.any()


def test_attached_modules_stay_attached(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    save_checkpoint(tmp_path / "file", SharedParameters.from_module(copy.deepcopy(module)))
    expected = module.weight.detach().clone()
    shared = SharedParameters.from_module(module)
    shared.flat.fill_(9)
    load_checkpoint(tmp_path / "file", shared)
    assert torch.equal(module.weight, expected)
    shared.flat.fill_(1)
    assert module.weight.eq(1).all()


def test_versions_of_all_processes_are_saved_as_one(tmp_path: Path) -> None:
    saved, loaded = make_shared(0), make_shared(50)
    saved.share_memory_(processes=2)
    saved.versions.copy_(torch.tensor([5, 6, 7]))
    save_checkpoint(tmp_path / "file", saved)
    loaded.share_memory_(processes=3)
    loaded.versions.fill_(9)
    loaded.slot = 2
    assert load_checkpoint(tmp_path / "file", loaded).version == 18
    assert loaded.versions.tolist() == [0, 0, 18, 0]
    assert loaded.version == 18


def _load_in_child(path: Path, shared: SharedParameters) -> None:
    torch.set_num_threads(1)
    load_checkpoint(path, shared)


@may_fork_with_threads
def test_loading_into_shared_memory_reaches_other_processes(tmp_path: Path) -> None:
    saved, loaded = with_all(0), with_all(50)
    save_checkpoint(tmp_path / "file", saved)
    loaded.share_memory_(processes=1)
    assert run_to_end(FORK.Process(target=_load_in_child, args=(tmp_path / "file", loaded))) == 0
    assert state_of(loaded) == state_of(saved)


@pytest.mark.gpu
def test_loads_onto_another_device(tmp_path: Path) -> None:
    on_cpu = make_shared(0)
    on_gpu = SharedParameters({name: view.cuda() for name, view in make_shared(50).views.items()})
    for tensor in on_cpu.make_worker_state(3).named().values():
        tensor.copy_(normal(3 * on_cpu.elements, torch.float32, 20).view(3, -1))
    generator = torch.Generator("cuda").manual_seed(3)
    save_checkpoint(tmp_path / "from_cpu", on_cpu, generators={"noise": generator})
    noise = torch.randn(5, generator=generator, device="cuda")

    checkpoint = load_checkpoint(tmp_path / "from_cpu", on_gpu)
    assert on_gpu.flat.is_cuda
    assert state_of(on_gpu) == state_of(on_cpu)
    generator.set_state(checkpoint.generators["noise"])
    assert torch.equal(torch.randn(5, generator=generator, device="cuda"), noise)

    save_checkpoint(tmp_path / "from_gpu", on_gpu)
    back = make_shared(50)
    load_checkpoint(tmp_path / "from_gpu", back)
    assert state_of(back) == state_of(on_cpu)


@pytest.mark.parametrize("stop", [0, 1, 13])
def test_a_run_that_resumes_makes_the_same_bits(tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "backend": "numpy"}

    def train(shared: SharedParameters, generator: torch.Generator, updates: int) -> None:
        for _ in range(updates):
            noise = torch.randn(shared.elements, generator=generator)
            rmsprop_(shared.flat, shared.flat + noise, shared.ms, **options)
            shared.land(shared.version)

    whole = make_shared(0)
    train(whole, torch.Generator().manual_seed(3), 20)

    first, generator = make_shared(0), torch.Generator().manual_seed(3)
    train(first, generator, stop)
    save_checkpoint(tmp_path / "file", first, iterations=[stop], generators={"noise": generator})
    second, generator = make_shared(50), torch.Generator()
    checkpoint = load_checkpoint(tmp_path / "file", second)
    generator.set_state(checkpoint.generators["noise"])
    train(second, generator, 20 - checkpoint.iterations[0])
    assert state_of(second) == state_of(whole)


def test_any_reader_of_safetensors_can_read_it(tmp_path: Path) -> None:
    shared = make_shared(0)
    save_checkpoint(tmp_path / "file", shared)
    tensors = load_file(tmp_path / "file")
    assert tensors.keys() == {"param/layer.weight", "param/layer.bias", "param/scale", "ms"}
    assert torch.equal(tensors["param/layer.weight"], shared.views["layer.weight"])
    assert torch.equal(tensors["ms"], shared.ms)


# Damage


def assert_refused(path: Path, shared: SharedParameters, *words: str) -> None:
    """Loading raises a ValueError that names the file and says these words; nothing changes."""
    before = state_of(shared)
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        load_checkpoint(path, shared)
    for word in words:
        assert word in str(raised.value)
    assert state_of(shared) == before


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    save_checkpoint(whole, with_all(0), iterations=[1, 2], seeds={"data": 3})
    data, shared = whole.read_bytes(), with_all(50)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert_refused(path, shared, "damaged")
    path.write_bytes(data + b"\0")
    assert_refused(path, shared, "damaged")


def test_a_file_with_any_bit_flipped_is_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "flipped"
    save_checkpoint(whole, SharedParameters({"p": torch.ones(3)}), iterations=[1, 2])
    data, shared = bytearray(whole.read_bytes()), SharedParameters({"p": torch.zeros(3)})
    for place, bit in itertools.product(range(len(data)), range(8)):
        data[place] ^= 1 << bit
        path.write_bytes(data)
        assert_refused(path, shared)
        data[place] ^= 1 << bit


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x04N." * 100, b"PK\x03\x04" + b"\0" * 99]
)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert_refused(tmp_path / "file", make_shared(0), "no checkpoint")


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"ms": torch.zeros(3)}, tmp_path / "file", {"format": "pt"})
    assert_refused(tmp_path / "file", make_shared(0), "must be a checkpoint of hogstream")
    save_file({"ms": torch.zeros(3)}, tmp_path / "file")
    assert_refused(tmp_path / "file", make_shared(0), "must be a checkpoint of hogstream")


def test_a_file_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        load_checkpoint(tmp_path / "none", make_shared(0))
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        load_checkpoint(tmp_path, make_shared(0))


# Whole files that do not fit


def forge(path: Path, change: Callable[[Tensors, dict[str, str], dict[str, Any]], Any]) -> None:
    """Changes the tensors, metadata or content of a checkpoint, and makes its checksum right."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, content = load_file(path), json.loads(metadata["content"])
    change(tensors, metadata, content)
    metadata["content"] = json.dumps(content)
    del metadata["crc32"]
    crc = zlib.crc32(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = [name, str(tensor.dtype).split(".")[1], [*tensor.shape]]
        crc = zlib.crc32(json.dumps(kind).encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    save_file(tensors, path, {**metadata, "crc32": format(crc, "08x")})


def test_forging_as_such_is_not_what_is_refused(tmp_path: Path) -> None:
    saved, loaded = with_all(0), with_all(50)
    save_checkpoint(tmp_path / "file", saved, iterations=[1, 2])
    forge(tmp_path / "file", lambda tensors, metadata, content: content.update(version=5))
    assert load_checkpoint(tmp_path / "file", loaded).version == 5
    assert loaded.views["scale"] == saved.views["scale"]


CHANGES: dict[str, tuple[Callable[[Tensors, dict[str, str], dict[str, Any]], Any], list[str]]] = {
    "other-format": (
        lambda tensors, metadata, content: metadata.update(hogstream_checkpoint="2"),
        ["format 1", "got 2", "written by hogstream"],
    ),
    "parameter-missing": (
        lambda tensors, metadata, content: tensors.pop("param/scale"),
        ["missing: ['param/scale'], unknown: []"],
    ),
    "ms-missing": (
        lambda tensors, metadata, content: tensors.pop("ms"),
        ["missing: ['ms'], unknown: []"],
    ),
    "worker-ms-missing": (
        lambda tensors, metadata, content: tensors.pop("worker_ms"),
        ["missing: ['worker_ms'], unknown: []"],
    ),
    "momentum-of-another-dtype": (
        lambda tensors, metadata, content: tensors.update(
            momentum_buffer=tensors["momentum_buffer"].double()
        ),
        ["momentum_buffer must be float32 of shape (21,)", "got float64 of shape (21,)"],
    ),
    "momentum-of-other-workers": (
        lambda tensors, metadata, content: tensors.update(
            worker_momentum_buffer=torch.zeros(3, 21)
        ),
        ["worker_momentum_buffer must be float32 of shape (2, 21)", "got float32 of shape (3, 21)"],
    ),
    "tensor-unknown": (
        lambda tensors, metadata, content: tensors.update(extra=torch.zeros(1)),
        ["missing: [], unknown: ['extra']"],
    ),
    "shape": (
        lambda tensors, metadata, content: tensors.update({"param/layer.bias": torch.zeros(5, 1)}),
        ["param/layer.bias must be float32 of shape (5,)", "got float32 of shape (5, 1)"],
    ),
    "dtype": (
        lambda tensors, metadata, content: tensors.update(ms=tensors["ms"].double()),
        ["ms must be float32 of shape (21,)", "got float64 of shape (21,)"],
    ),
    "more-workers": (
        lambda tensors, metadata, content: tensors.update(worker_ms=torch.zeros(3, 21)),
        ["worker_ms must be float32 of shape (2, 21)", "got float32 of shape (3, 21)"],
    ),
    "no-workers": (
        lambda tensors, metadata, content: tensors.update(worker_ms=torch.zeros(0, 21)),
        ["worker_ms must be float32 of shape (2, 21)", "got float32 of shape (0, 21)"],
    ),
    "races-of-other-blocks": (
        lambda tensors, metadata, content: tensors.update(
            races=torch.zeros(3, 99, dtype=torch.int64)
        ),
        ["races must be int64 of shape (3, ", "got int64 of shape (3, 99)"],
    ),
    "generator-of-floats": (
        lambda tensors, metadata, content: tensors.update({"generator/g": torch.zeros(3)}),
        ["generator g must be uint8 of shape (n,), got float32 of shape (3,)"],
    ),
    "version-negative": (
        lambda tensors, metadata, content: content.update(version=-1),
        ["version must be an integer >= 0", "got -1"],
    ),
    "version-too-large": (
        lambda tensors, metadata, content: content.update(version=1 << 63),
        ["version must be an integer >= 0", f"got {1 << 63}"],
    ),
    "version-missing": (lambda tensors, metadata, content: content.pop("version"), ["'version'"]),
    "content-unknown": (lambda tensors, metadata, content: content.update(extra=1), ["'extra'"]),
    "iterations-negative": (
        lambda tensors, metadata, content: content.update(iterations=[1, -2]),
        ["iterations must be an integer >= 0, got -2"],
    ),
    "iterations-of-other-workers": (
        lambda tensors, metadata, content: content.update(iterations=[1, 2, 3]),
        ["iterations must be of 2 workers", "got 3"],
    ),
    "iterations-no-list": (
        lambda tensors, metadata, content: content.update(iterations=5),
        ["iterations must be integers", "got 5"],
    ),
    "seed-no-integer": (
        lambda tensors, metadata, content: content.update(seeds={"data": 0.5}),
        ["seed data must be an integer", "got 0.5"],
    ),
    "seeds-no-mapping": (
        lambda tensors, metadata, content: content.update(seeds=[5]),
        ["seeds must map names to integers, got [5]"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_whole_file_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    change, words = CHANGES[case]
    save_checkpoint(tmp_path / "file", with_all(0), iterations=[1, 2])
    forge(tmp_path / "file", change)
    assert_refused(tmp_path / "file", with_all(50), *words)


@pytest.mark.parametrize(
    "shape", [(), (21,), (0, 21), (2, 20), (2, 3, 7)], ids=lambda shape: "x".join(map(str, shape))
)
def test_worker_ms_of_a_wrong_shape_are_not_made(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_checkpoint(tmp_path / "file", make_shared(0))
    forge(tmp_path / "file", lambda tensors, _, __: tensors.update(worker_ms=torch.zeros(shape)))
    assert_refused(tmp_path / "file", make_shared(50), "worker_ms must be float32 of shape (")


def test_content_that_is_missing_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "file", make_shared(0))
    crc = zlib.crc32(b'{"hogstream_checkpoint": "1"}')
    save_file({}, tmp_path / "file", {"hogstream_checkpoint": "1", "crc32": format(crc, "08x")})
    assert_refused(tmp_path / "file", make_shared(50), "cannot be loaded")


# Saving


@pytest.mark.parametrize("call", [save_checkpoint, load_checkpoint])
def test_what_is_not_shared_is_refused_by_its_name(
    tmp_path: Path, call: Callable[[Path, Any], object]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, make_shared(0))
    before = path.read_bytes()
    with pytest.raises(TypeError, match="shared must be SharedParameters, got Linear"):
        call(path, torch.nn.Linear(2, 1))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"iterations": [1, -1]}, ValueError, "iterations must be an integer >= 0, got -1"),
        ({"iterations": [1.0, 2]}, TypeError, "iterations must be an integer >= 0, got 1.0"),
        ({"iterations": 7}, TypeError, "iterations must be integers, one for each worker, got 7"),
        ({"iterations": [1, 2, 3]}, ValueError, "iterations must be of 2 workers"),
        ({"seeds": {"data": "3"}}, TypeError, "seed data must be an integer"),
        ({"seeds": {"data": 1 << 64}}, ValueError, "seed data must be an integer"),
        ({"seeds": {3: 3}}, TypeError, "names of seeds and generators must be strings, got 3"),
        ({"seeds": 3}, TypeError, "seeds must map names to integers, got 3"),
        ({"generators": {"g": 3}}, TypeError, "generator g must be a torch.Generator, got 3"),
        ({"generators": [3]}, TypeError, "generators must map names to generators, got [3]"),
        ({"seeds": 0}, TypeError, "seeds must map names to integers, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_leave_the_old_file_alone(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    shared = with_all(0)
    save_checkpoint(tmp_path / "file", shared)
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(error) as raised:
        save_checkpoint(tmp_path / "file", shared, **arguments)
    assert words in str(raised.value)
    assert (tmp_path / "file").read_bytes() == before


def filled(version: int, elements: int = 1000) -> SharedParameters:
    """Parameters that hold their version everywhere."""
    shared = SharedParameters({"p": torch.full((elements,), float(version))})
    shared.ms.fill_(version)
    shared.versions[0] = version
    return shared


def version_in(path: Path, elements: int = 1000) -> int:
    """The version of a whole file that ``filled`` parameters were saved to."""
    shared = filled(0, elements)
    version = load_checkpoint(path, shared).version
    assert shared.flat.eq(version).all()
    assert shared.ms.eq(version).all()
    return version


def _save_and_die(path: Path, line: int) -> None:
    """Saves, and is killed when it comes to a line of our code, counted from 1."""
    torch.set_num_threads(1)
    lines = itertools.count(1)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if "scheduler" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    shared = filled(2)
    sys.settrace(trace)
    save_checkpoint(path, shared)
    sys.settrace(None)


@pytest.mark.slow
@may_fork_with_threads
def test_killed_at_any_line_it_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path, found = tmp_path / "file", []
    save_checkpoint(path, filled(1))
    for line in itertools.count(1):
        code = run_to_end(FORK.Process(target=_save_and_die, args=(path, line)))
        found.append(version_in(path))
        if found[-1] == 2:
            save_checkpoint(path, filled(1))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert len(found) > 20
    assert found == sorted(found)  # the old one up to the renaming, the new one from there on
    assert found[-1] == 2
    assert found[-2] == 2  # killed after the renaming


def _save_again_and_again(path: Path, elements: int) -> None:
    torch.set_num_threads(1)
    for version in itertools.count(1):
        save_checkpoint(path, filled(version, elements))


@may_fork_with_threads
@pytest.mark.parametrize("part", range(8))
def test_killed_while_it_writes_it_leaves_the_old_file_or_the_new(
    tmp_path: Path, part: int
) -> None:
    path, elements = tmp_path / "file", 1_000_000
    process = FORK.Process(target=_save_again_and_again, args=(path, elements))
    process.start()
    try:
        while True:  # until this part of a file that is to replace another has been written
            sizes = [new.stat().st_size for new in tmp_path.glob(".*.tmp") if new.exists()]
            if path.exists() and any(size >= part * elements for size in sizes):
                break
            assert process.is_alive()
    except FileNotFoundError:
        pass  # renamed that very moment: as good a one as others
    finally:
        process.kill()
        process.join()
    assert version_in(path, elements) >= 1
    save_checkpoint(path, filled(7, elements))  # what was left does no harm
    assert version_in(path, elements) == 7


def _save_with_limit(path: Path, limit: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match="too large") as raised:
        save_checkpoint(path, filled(2))
    assert raised.value.filename == str(path)


@may_fork_with_threads
@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_disk_that_gives_no_more_leaves_the_old_file(tmp_path: Path, limit: int) -> None:
    save_checkpoint(tmp_path / "file", filled(1))
    assert run_to_end(FORK.Process(target=_save_with_limit, args=(tmp_path / "file", limit))) == 0
    assert version_in(tmp_path / "file") == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError, match=str(path)):
        save_checkpoint(path, make_shared(0))
