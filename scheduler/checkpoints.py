"""Checkpoints: all that workers share, saved to one file and loaded from it.

A checkpoint is a safetensors file, so that loading one runs no code. Its tensors are
``param/<name>``, ``buffer/<name>``, ``ms``, ``generator/<name>`` and, where there are any,
``grad_avg``, ``momentum_buffer``, these three of each worker (``worker_ms`` and so on), each
worker's buffers (``worker_buffer/<name>``) and ``races``. Complex ones are pairs of numbers. Its
metadata, all strings, are ``hogstream_checkpoint`` (the version of this format), ``hogstream`` (the
version that wrote it), ``content`` (JSON: version, iterations, seeds, and how many elements
``races`` count together) and ``crc32`` (a checksum of all the rest).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata as packages
from typing import Any

import torch

from hogstream.kernels.race_counters import RaceCounters
from hogstream.scheduler.checks import check_integer, check_type
from hogstream.scheduler.files import replace_file
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.update_state import KINDS, UpdateState

#: Version of the format; other versions are refused.
FORMAT = 1

_GENERATOR = "generator/"
_WORKER = "worker_"
_BUFFER, _WORKER_BUFFER = "buffer/", "worker_buffer/"
# What a checkpoint need not have of what shared parameters have.
_BEGINS_LATER = {
    "races",
    *(prefix + kind for prefix in ("", _WORKER) for kind in KINDS),
}
_SEEDS = -(1 << 63), (1 << 64) - 1  # what torch.manual_seed takes


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside the shared parameters.

    Attributes:
        version: How many updates the parameters have had.
        iterations: How many iterations each worker has finished; empty if that was not saved.
        seeds: Seeds by name.
        generators: The state of each generator by name, for ``torch.Generator.set_state``: uint8,
            shape (bytes,), on the CPU.
    """

    version: int
    iterations: tuple[int, ...]
    seeds: dict[str, int]
    generators: dict[str, torch.Tensor]


def save_checkpoint(
    path: str | os.PathLike[str],
    shared: SharedParameters,
    *,
    iterations: Iterable[int] = (),
    seeds: Mapping[str, int] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
) -> None:
    """Saves shared parameters and what else a run goes on from.

    No update may be in flight: one that lands meanwhile is saved in part. Needs memory on the host
    for two copies of what is saved. A crash leaves the old file or the new one, never a part.

    Args:
        path: The file to write, or to write anew.
        shared: Saved with its buffers and state, those of its workers, ``races`` and ``version``.
        iterations: How many iterations each worker has finished.
        seeds: Seeds by name.
        generators: Generators by name, whose states are saved.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an iteration is negative, or they are not as many as there are
            ``worker_ms``.
        OSError: If the file cannot be written; an old one stays as it was.
    """
    check_type("shared", shared, SharedParameters)
    from safetensors.torch import save  # here: training without checkpoints needs none of it

    states = _states_of({} if generators is None else generators)
    tensors = _tensors_of(shared)
    checkpoint = _checked(
        tensors, shared.version, iterations, {} if seeds is None else seeds, states
    )
    tensors |= {_GENERATOR + name: state for name, state in states.items()}
    copies = {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content = {
        "version": checkpoint.version,
        "iterations": checkpoint.iterations,
        "seeds": checkpoint.seeds,
        "race_block": None if shared.races is None else shared.races.block,
    }
    metadata = {
        "hogstream_checkpoint": str(FORMAT),
        "hogstream": packages.version("hogstream"),
        "content": json.dumps(content),
    }
    metadata["crc32"] = _checksum(copies, metadata)
    data = save(copies, metadata)
    with replace_file(path) as file:
        file.write(data)


def load_checkpoint(path: str | os.PathLike[str], shared: SharedParameters) -> Checkpoint:
    """Loads a checkpoint into shared parameters, in place: modules that are attached stay so.

    No update may be in flight. State and ``races`` are made in ``shared`` if the checkpoint has
    them. A ``grad_avg`` or ``momentum_buffer`` that ``shared`` has and the checkpoint has not
    begins with zeros, as the updates until then had none; so do races. Workers' own buffers that
    ``shared`` has and the checkpoint has not begin as copies of the buffers.

    Args:
        path: A file that ``save_checkpoint`` wrote.
        shared: With the names, shapes and dtypes of the parameters and buffers saved; on any
            device.

    Returns:
        What else the checkpoint holds.

    Raises:
        TypeError: If ``shared`` is something else.
        OSError: If the file cannot be read.
        ValueError: If it is damaged, no checkpoint, of another format or of other parameters;
            nothing has changed then.
        RuntimeError: If state would have to be made in a process that others share ``ms`` with;
            nothing has changed then.
        MemoryError: If state or ``races`` do not fit the device; nothing has changed then.
    """
    check_type("shared", shared, SharedParameters)
    tensors, content = _read(path)
    states = {
        name.removeprefix(_GENERATOR): tensors.pop(name).clone()
        for name in list(tensors)
        if name.startswith(_GENERATOR)
    }
    try:
        described = json.loads(content)
        block = described.pop("race_block", None)
        _check_fits(tensors, shared, block)
        checkpoint = _checked(tensors, generators=states, **described)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    with shared.undone_on_error():
        shared.make_state([kind for kind in KINDS if kind in tensors])
        if "worker_ms" in tensors:
            kinds = [kind for kind in KINDS if _WORKER + kind in tensors]
            shared.make_worker_state(len(tensors["worker_ms"]), kinds)
        if "races" in tensors:
            shared.count_races(block)
        for name in tensors:
            if name.startswith(_WORKER_BUFFER):
                shared.make_worker_buffers(len(tensors[name]))
    for name, mine in _tensors_of(shared).items():
        if name in tensors:
            mine.copy_(tensors[name])
        elif name.startswith(_WORKER_BUFFER):
            mine.copy_(tensors[_BUFFER + name.removeprefix(_WORKER_BUFFER)].expand_as(mine))
        else:
            mine.zero_()
    if shared.row_versions is not None:
        shared.row_versions.zero_()
    for counters in shared.row_races.values():
        counters.counts.zero_()
    shared.versions.zero_()
    shared.versions[shared.slot] = checkpoint.version
    return checkpoint


def _tensors_of(shared: SharedParameters) -> dict[str, torch.Tensor]:
    """What is saved and loaded of shared parameters, by its name in the file."""
    tensors = {f"param/{name}": view for name, view in shared.views.items()}
    tensors |= shared.state.named()
    if shared.worker_state is not None:
        tensors |= shared.worker_state.named(_WORKER)
    if shared.races is not None:
        tensors["races"] = shared.races.counts
    for prefix, buffers in (
        (_BUFFER, shared.buffers),
        (_WORKER_BUFFER, shared.worker_buffers or {}),
    ):
        for name, buffer in buffers.items():  # safetensors has not all complex dtypes
            tensors[prefix + name] = torch.view_as_real(buffer) if buffer.is_complex() else buffer
    return tensors


def _states_of(generators: Mapping[str, torch.Generator]) -> dict[str, torch.Tensor]:
    if not isinstance(generators, Mapping):
        raise TypeError(f"generators must map names to generators, got {generators!r}")
    for name, generator in generators.items():
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator {name} must be a torch.Generator, got {generator!r}")
    return {name: generator.get_state() for name, generator in generators.items()}


def _checked(
    tensors: Mapping[str, torch.Tensor],
    version: Any,
    iterations: Any,
    seeds: Any,
    generators: Mapping[str, torch.Tensor],
) -> Checkpoint:
    """A checkpoint of what a user gave, or a file holds, beside the parameters' tensors."""
    if not isinstance(iterations, Iterable):
        raise TypeError(f"iterations must be integers, one for each worker, got {iterations!r}")
    if not isinstance(seeds, Mapping):
        raise TypeError(f"seeds must map names to integers, got {seeds!r}")
    for name in (*seeds, *generators):
        if not isinstance(name, str):
            raise TypeError(f"names of seeds and generators must be strings, got {name!r}")
    for name, state in generators.items():
        if state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError(f"generator {name} must be uint8 of shape (n,), got {_kind(state)}")
    counts = tuple(check_integer("each of iterations", count, 0) for count in iterations)
    workers = len(tensors.get("worker_ms", counts))
    if counts and len(counts) != workers:
        raise ValueError(f"iterations must be of {workers} workers as worker_ms, got {len(counts)}")
    return Checkpoint(
        version=check_integer("version", version, 0, torch.iinfo(torch.int64).max),
        iterations=counts,
        seeds={name: check_integer(f"seed {name}", seed, *_SEEDS) for name, seed in seeds.items()},
        generators=dict(generators),
    )


def _check_fits(
    tensors: Mapping[str, torch.Tensor], shared: SharedParameters, race_block: Any
) -> None:
    """Checks that tensors read from a file are those of the shared parameters.

    Raises:
        ValueError: If a name, shape or dtype differs.
    """
    mine = _tensors_of(shared)
    expected = mine | _may_be_made(tensors, shared, race_block)
    missing = {
        name
        for name in mine.keys() - _BEGINS_LATER - tensors.keys()
        if not name.startswith(_WORKER_BUFFER)
    }
    unknown = tensors.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"it must hold the shared parameters' tensors; "
            f"missing: {sorted(missing)}, unknown: {sorted(unknown)}"
        )
    for name, tensor in tensors.items():
        if _kind(tensor) != _kind(expected[name]):
            raise ValueError(
                f"{name} must be {_kind(expected[name])} as the shared one, got {_kind(tensor)}"
            )


def _may_be_made(
    tensors: Mapping[str, torch.Tensor], shared: SharedParameters, race_block: Any
) -> dict[str, torch.Tensor]:
    """What is made in shared parameters if a file has it, by name: of these shapes and dtypes."""
    kinds = len(UpdateState._fields)
    made = UpdateState(*[shared.ms] * kinds).named()
    mine = _tensors_of(shared)
    if "worker_ms" in tensors:
        workers = max((1, *tensors["worker_ms"].shape[:1]))
        if shared.worker_ms is not None:  # else of any number of workers
            workers = len(shared.worker_ms)
        made |= UpdateState(*[shared.ms.expand(workers, -1)] * kinds).named(_WORKER)
    for name, rows in tensors.items():
        of = _BUFFER + name.removeprefix(_WORKER_BUFFER)
        if name.startswith(_WORKER_BUFFER) and of in mine and shared.worker_buffers is None:
            workers = max((1, *rows.shape[:1]))
            made[name] = mine[of].expand(workers, *mine[of].shape)
    if "races" in tensors:
        block = check_integer("race_block", race_block, 1)
        if shared.races is not None and shared.races.block != block:
            raise ValueError(f"race_block must be {shared.races.block} as here, got {block}")
        counters = RaceCounters.zeros(shared.elements, block, torch.device("meta"))
        made["races"] = counters.counts
    return made


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors and the content of a file, whose format and checksum are right."""
    from safetensors import SafetensorError, safe_open

    try:
        # Opened by Python as well, whose errors name the file and what is wrong with it.
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no checkpoint: {error}") from error
    saved = metadata.pop("crc32", None)
    actual = _checksum(tensors, metadata)
    if saved != actual:
        raise ValueError(f"{path} is damaged: its checksum must be {saved}, got {actual}")
    return tensors, metadata.get("content", "")


def _check_format(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    found = metadata.get("hogstream_checkpoint")
    if found is None:
        raise ValueError(f"{path} must be a checkpoint of hogstream, got other safetensors")
    if found != str(FORMAT):
        raise ValueError(
            f"{path} must be of checkpoint format {FORMAT}, got {found}, "
            f"written by hogstream {metadata.get('hogstream')}"
        )


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32, in 8 hexadecimal digits, of the JSON of the metadata and then of each tensor.

    Keys are sorted; a tensor is the JSON of its name, dtype and shape, and then its bytes.
    """
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        description = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        crc = zlib.crc32(json.dumps(description).encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
