"""A worker whose step is compiled: thousands of updates for each turn of the event loop.

This module needs Numba.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends.numba_kernels import finite_function
from hogstream.kernels.backends.numba_rows import Kinds, update_function
from hogstream.kernels.backends.numba_vectors import CACHE_LINE
from hogstream.kernels.backends.select import check_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import GRAD, GRAD_AVG, MOMENTUM_BUFFER, MS, PARAM
from hogstream.kernels.operands import DTYPE_NAMES
from hogstream.kernels.row_table import (
    BEFORE,
    BLOCK,
    COUNTS,
    FACTORS,
    FIELDS,
    LOCK_BLOCK,
    LOCKS,
    NUMBER,
    ORDER,
    ROW_VERSIONS,
    ROWS,
    SLOTS,
    STALE,
    UPDATED,
    VERSIONS,
    WIDTH,
)
from hogstream.scheduler.checks import SettingError, check_callable, check_integer, check_type
from hogstream.scheduler.context import WorkerContext
from hogstream.scheduler.lanes import rings
from hogstream.scheduler.lanes.base import LaneSettings
from hogstream.scheduler.lanes.compiled import SettingsMemory
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.policies import COMPILED_POLICIES
from hogstream.scheduler.workers import native_steps as steps
from hogstream.scheduler.workers.epochs import Epochs, Indices, Order

_DTYPES = (torch.float32, torch.float64)
# One update in so many is looked at: its staleness takes two looks at what other cores write.
_EVERY = 16


class NativeWorker:
    """Trains by a step that Numba compiles: no Python, and no GIL, from one sample to the next.

    ::

        def step(parameters, samples, state):
            users, items = parameters           # arrays of shape (N, D), which change meanwhile
            of_user, of_item, ratings = samples
            user, item = of_user[state.sample], of_item[state.sample]
            error = (users[user] * items[item]).sum() - ratings[state.sample]
            state.rows[0][0], state.rows[1][0] = user, item
            state.grads[0][0] = error * items[item]
            state.grads[1][0] = error * users[user]
            return error * error

        worker = NativeWorker(shared, step, (of_user, of_item, ratings), {"users": 1, "items": 1})

    For each sample the step reads what it needs of the parameters, live, and writes the gradient of
    some rows; the loop around it applies the update, as the policy has it, by the code that
    ``sparse_rmsprop_`` runs. Reads, gradients and updates of all workers race as Hogwild's do.

    A worker makes a chunk of updates on its own thread, then the event loop hears of them: counts,
    the mean of the losses, an error of the step. Each update is an iteration of the worker. When
    it is cancelled it makes no further one. The samples are gone through in epochs, each in an
    order of its own, whose parts are dealt to workers; each process has epochs of its own.

    It runs where lanes are compiled: on a CPU, with Numba. Policies are ``lock-free``, ``locked``,
    ``row-locked`` and ``ordered``; others need the event loop between two updates.

    Attributes:
        epochs: What deals samples.
    """

    def __init__(
        self,
        shared: SharedParameters,
        step: Callable[..., Any],
        samples: Sequence[npt.NDArray[Any]],
        tables: Mapping[str, int],
        *,
        order: Order | None = None,
        chunk: int = 16384,
        seed: int = 0,
    ) -> None:
        """Compiles the step.

        Args:
            shared: The shared parameters, on a CPU, float32 or float64.
            step: ``step(parameters, samples, state)``, which returns the loss of one sample: a
                function that Numba compiles without Python's objects, or has compiled.
                ``parameters`` are the tables, arrays of shape (N, D), in the order of ``tables``;
                ``samples`` as given here, as a tuple; ``state`` is a ``NativeState``: the sample,
                and where to write the rows and their gradients. A step that raises ends its worker.
            samples: Arrays of one length n, at least 1: of whatever dtypes.
            tables: Names of the shared parameters that are read and updated, each of one axis or
                more; and of how many of its rows, at least 1, a sample may have a gradient.
            order: Makes the order of an epoch, whole or in parts: a list of at least one. They are
                dealt to workers in turn; who has none left takes one of another's. By default, a
                permutation of all samples.
            chunk: How many updates a worker makes at most between two turns of the event loop: it
                has such a turn every 10 ms in any case.
            seed: Of the generator that orders are drawn from; another in each process.

        Raises:
            TypeError: If an argument is of a wrong type.
            ValueError: If parameters are not of a dtype or on a device that can be compiled for, a
                name is unknown, lengths differ or a number is out of range.
            RuntimeError: If Numba cannot run here.
            numba.core.errors.NumbaError: If the step cannot be compiled.
        """
        check_backend("numba")
        check_type("shared", shared, SharedParameters)
        if shared.flat.device.type != "cpu" or shared.flat.dtype not in _DTYPES:
            raise ValueError(
                "shared must be of float32 or float64 on a CPU for a compiled step, "
                f"got {shared.flat.dtype} on {shared.flat.device}"
            )
        self._samples = _checked_samples(samples)
        self._tables = _checked_tables(shared, tables)
        self._shared = shared
        self._step = check_callable("step", step)
        self._order = None if order is None else check_callable("order", order)
        self._chunk = check_integer("chunk", chunk, at_least=1)
        self._seed = check_integer("seed", seed, at_least=0)
        generator = np.random.default_rng((self._seed, shared.slot))
        self.epochs = Epochs(len(self._samples[0]), self._order, generator)
        self._commons: dict[int, _Common] = {}
        self._loops: dict[int, NativeLoop] = {}
        self._compile()

    def __reduce__(self) -> tuple[Any, ...]:
        """It is compiled anew where it is sent, and begins its epochs there."""
        arguments = self._shared, self._step, self._samples, self._tables
        options = {"order": self._order, "chunk": self._chunk, "seed": self._seed}
        return _remade, (arguments, options)

    async def __call__(self, context: WorkerContext) -> None:
        """Makes a chunk of updates.

        Raises:
            SettingError: If a setting of the scheduler is one that a chunk cannot keep.
            IndexError: If a step says of a row that is not in its table.
            FloatingPointError: If a gradient holds an infinity or NaN, with
                ``on_nonfinite="raise"``.
            OSError: If the lock refuses.
            Exception: Whatever the step raises.
        """
        loop = self._loops.get(context.index)
        if loop is None or loop.context is not context:
            loop = self._loops[context.index] = self._begin_run(context)
        await context.run_chunk(loop)

    def _compile(self) -> None:
        self.run = steps.compile_step(self._step)
        memory = _Memory(self._shared, self._tables)
        nothing = steps.Places(*[0] * len(steps.Places._fields))
        numbers = steps.Numbers(0, 0, 1, counts_rows=False, tells=False, stops=False, until_ns=0)
        none = np.zeros(0, np.int64)
        arguments = memory.arguments(self._samples, none, none.reshape(0, 2))
        if not isinstance(self.run(*arguments, nothing, numbers), float):
            raise TypeError(f"step must return a loss, a real number, and {self._step!r} does not")

    def _begin_run(self, context: WorkerContext) -> NativeLoop:
        settings = context.lane_settings
        common = self._commons.get(id(settings))
        if common is None:
            common = self._commons[id(settings)] = _Common(settings, context.settings.workers)
            context.on_close(lambda: self._forget(settings))
        _check_settings(context)
        return NativeLoop(self, context, common, _Memory(self._shared, self._tables))

    def _forget(self, settings: LaneSettings) -> None:
        """Lets go of a scheduler that has closed, with all that it holds."""
        self._commons.pop(id(settings), None)
        for index, loop in list(self._loops.items()):
            if loop.settings is settings:
                del self._loops[index]

    @property
    def chunk(self) -> int:
        """How many updates a worker makes at most between two turns of the event loop."""
        return self._chunk

    @property
    def samples(self) -> tuple[npt.NDArray[Any], ...]:
        """As they were given."""
        return self._samples


class _Common:
    """What the workers of one scheduler have in common.

    Attributes:
        settings: Of the lanes; kept, so that its id is no other's.
        memory: The same, for compiled code.
        landings: How many updates each worker has made: a line each.
        tickets: As ``native_steps`` has it; None if nothing is ordered.
    """

    def __init__(self, settings: LaneSettings, workers: int) -> None:
        self.settings = settings
        self.memory = SettingsMemory(settings)
        if settings.check_finite:
            dtype = DTYPE_NAMES[settings.shared.flat.dtype]
            self.memory.words[rings.FINITE] = finite_function(dtype).address
        self.landings = _own_lines((workers * steps.LINE,), np.int64)
        self.tickets = _own_lines((steps.TICKETS,), np.int64) if settings.ordered else None


class _Memory:
    """What a worker's step reads and writes: tables, rows and gradients, and the update's fields.

    Attributes:
        parameters: Of each table, what is shared: (N, D).
        rows: Of each, where the step writes rows: int64, (r,).
        grads: Of each, where it writes gradients: (r, D).
        fields: Of each, what ``numba_rows`` says of an update: int64, (tables, FIELDS).
    """

    def __init__(self, shared: SharedParameters, tables: Mapping[str, int]) -> None:
        self._names = list(tables)
        views = [shared.views[name] for name in tables]
        self.parameters = tuple(view.detach().numpy().reshape(view.shape[0], -1) for view in views)
        dtype = self.parameters[0].dtype
        self.rows, self._sorted, self._order = (
            tuple(_own_lines((count,), np.int64) for count in tables.values()) for _ in range(3)
        )
        for rows in self.rows:
            rows.fill(-1)
        self.grads = tuple(
            _own_lines((count, table.shape[1]), dtype)
            for count, table in zip(tables.values(), self.parameters, strict=True)
        )
        self.fields = _own_lines((len(tables), FIELDS), np.int64)
        for field, column in (
            (PARAM, [table.ctypes.data for table in self.parameters]),
            (GRAD, [grad.ctypes.data for grad in self.grads]),
            (ROWS, [each.ctypes.data for each in self._sorted]),
            (ORDER, [each.ctypes.data for each in self._order]),
            (WIDTH, [table.shape[1] for table in self.parameters]),
            (BEFORE, [view.storage_offset() - shared.flat.storage_offset() for view in views]),
            (NUMBER, 1),
        ):
            self.fields[:, field] = column

    def arguments(
        self, samples: tuple[npt.NDArray[Any], ...], order: Indices, measured: Indices
    ) -> tuple[Any, ...]:
        """What the compiled loop takes first."""
        own = self.rows, self.grads, self._sorted, self._order
        return self.parameters, samples, order, *own, measured

    def count_stale_rows(self, shared: SharedParameters) -> None:
        """Has updates count rows that others have changed since their read."""
        if shared.row_versions is None:
            return
        before = 0
        for name, view in shared.views.items():
            if name in self._names:
                address = shared.row_versions.data_ptr() + 8 * before
                self.fields[self._names.index(name), ROW_VERSIONS] = address
            before += view.shape[0] if view.dim() else 0
        self.fields[:, VERSIONS] = shared.versions.data_ptr()
        self.fields[:, SLOTS] = len(shared.versions)

    def take_stale_rows(self) -> tuple[int, int] | None:
        """How many rows were updated since the last call, and how many were stale."""
        if not self.fields[0, ROW_VERSIONS]:
            return None
        updated, stale = self.fields[:, UPDATED : STALE + 1].sum(axis=0).tolist()
        self.fields[:, UPDATED : STALE + 1] = 0
        return updated, stale


class NativeLoop:
    """One worker's compiled loop; a ``CompiledLoop``.

    Attributes:
        context: Whose updates it makes.
        chunk: How many at most between two turns of the event loop.
        worker: What it is a loop of.
        common: What all workers of the scheduler have.
        memory: What the step reads and writes.
    """

    def __init__(
        self, worker: NativeWorker, context: WorkerContext, common: _Common, memory: _Memory
    ) -> None:
        """Lays out what compiled code is given the addresses of."""
        self.settings = settings = common.settings
        self.context = context
        self.chunk = worker.chunk
        self.worker, self.common, self.memory = worker, common, memory
        self.thread = _own_lines((rings.THREAD,), np.int64)
        # The run's, and what an update makes of them by its staleness.
        self.factors = _own_lines((2 * steps.FACTOR_WORDS,), np.float64)
        self.dtype = DTYPE_NAMES[settings.shared.flat.dtype]
        fields, compute_bytes = memory.fields, memory.parameters[0].itemsize
        for field, tensor in zip((MS, GRAD_AVG, MOMENTUM_BUFFER), context.state, strict=True):
            if tensor is not None:
                fields[:, field] = tensor.data_ptr() + fields[:, BEFORE] * compute_bytes
        own = settings.staleness_aware * steps.FACTOR_BYTES
        fields[:, FACTORS] = self.factors.ctypes.data + own
        if settings.row_locks is not None:
            locks = settings.row_locks
            fields[:, LOCKS : LOCK_BLOCK + 1] = locks.address, locks.stripes, locks.block
        if settings.races is not None:
            races = settings.races
            fields[:, COUNTS : BLOCK + 1] = races.counts.data_ptr(), races.blocks, races.block
            memory.count_stale_rows(settings.shared)

    @property
    def every(self) -> int:
        """One update in so many is looked at more closely."""
        return 1 if self.settings.staleness_aware else _EVERY

    def begin(self, updates: int) -> _Chunk:
        """As in ``CompiledLoop``."""
        taken = self.worker.epochs.take(self.context.index, self.context.settings.workers, updates)
        return _Chunk(self, taken[0] if len(taken) == 1 else np.concatenate(taken))


class _Chunk:
    """One chunk's run of a loop: a ``CompiledRun``.

    Those of one loop run one after the other. What they count, and which samples they are of, is
    each one's own: one may be prepared while another that was given up has not returned yet.
    """

    def __init__(self, loop: NativeLoop, samples: Indices) -> None:
        """Prepares it for some samples."""
        self._loop, self._samples = loop, samples
        self._control = _own_lines((steps.CONTROL,), np.int64)
        self._control[steps.PERMITS] = len(samples)
        self._measured = _own_lines((len(samples) // loop.every + 1, 2), np.int64)
        self._rows: tuple[int, int] | None = None
        self._failed = False

    @property
    def made(self) -> int:
        """As in ``CompiledRun``."""
        return int(self._control[steps.MADE])

    @property
    def nonfinite(self) -> int:
        """As in ``CompiledRun``."""
        return int(self._control[steps.NONFINITE])

    def run(self, hyperparameters: Hyperparameters, until_ns: int) -> float:
        """As in ``CompiledRun``."""
        loop, memory = self._loop, self._loop.memory
        loop.factors[: steps.FACTOR_WORDS] = hyperparameters.factors
        switches = hyperparameters.switches.bits
        kinds = Kinds(loop.dtype, loop.dtype, switches, rowwise=False, lazy=False)
        places = self._places(update_function(kinds).address)
        arguments = memory.arguments(loop.worker.samples, self._samples, self._measured)
        self._failed = True  # unless it returns
        try:
            loss = loop.worker.run(*arguments, places, self._numbers(until_ns))
        finally:
            steps.tell_version(places)
            # Those too that the loop had taken, and has made nothing with.
            left = len(self._samples) - self.made - self.nonfinite
            self._control[steps.PERMITS] = left
            self._rows = memory.take_stale_rows()
        self._raise_fault()
        self._failed = False
        return float(loss)

    def end(self) -> int:
        """As in ``CompiledRun``."""
        return int(steps.take_back(self._control.ctypes.data))

    def finish(self) -> None:
        """As in ``CompiledRun``; what has failed is left to nobody."""
        done = self.made + self.nonfinite + self._failed
        self._loop.worker.epochs.give_back(self._loop.context.index, self._samples[done:])

    def measured(self) -> tuple[Counter[int], npt.NDArray[np.int64]]:
        """As in ``CompiledRun``."""
        found = self._measured[: self._control[steps.MEASURED]]
        ages, counts = np.unique(found[:, steps.STALENESS], return_counts=True)
        return (
            Counter(dict(zip(ages.tolist(), counts.tolist(), strict=True))),
            found[:, steps.NANOSECONDS],
        )

    def stale_rows(self) -> tuple[int, int] | None:
        """As in ``CompiledRun``."""
        return self._rows

    def _places(self, update: int) -> steps.Places:
        loop, tickets = self._loop, self._loop.common.tickets
        return steps.Places(
            control=self._control.ctypes.data,
            fields=loop.memory.fields.ctypes.data,
            update=update,
            settings=loop.common.memory.address,
            thread=loop.thread.ctypes.data,
            factors=loop.factors.ctypes.data,
            landings=loop.common.landings.ctypes.data,
            tickets=0 if tickets is None else tickets.ctypes.data,
            grad_bytes=loop.memory.parameters[0].itemsize,
        )

    def _numbers(self, until_ns: int) -> steps.Numbers:
        loop, settings = self._loop, self._loop.settings
        return steps.Numbers(
            worker=loop.context.index,
            workers=loop.context.settings.workers,
            every=loop.every,
            counts_rows=settings.races is not None,
            tells=settings.races is not None or len(settings.shared.versions) > 1,
            stops=loop.context.settings.on_nonfinite == "raise",
            until_ns=until_ns,
        )

    def _raise_fault(self) -> None:
        fault, table, row = self._control[steps.FAULT : steps.FAULT_ROW + 1].tolist()
        if fault == steps.ROW_FAULT:
            rows = len(self._loop.memory.parameters[table])
            raise IndexError(
                f"rows of table {table} must be >= 0 and < {rows}, or -1 for none, got {row}"
            )
        if fault == steps.NONFINITE_FAULT:
            raise FloatingPointError("a gradient held an infinity or NaN: it was left out")
        if fault < 0:
            raise OSError(-fault, "the lock of updates refuses")


def _own_lines(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeros in cache lines of their own: what one worker writes is in nobody's way."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 2 * CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    lines: npt.NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return lines


def _remade(arguments: tuple[Any, ...], options: dict[str, Any]) -> NativeWorker:
    return NativeWorker(*arguments, **options)


def _check_settings(context: WorkerContext) -> None:
    """Checks that a chunk keeps what a scheduler was asked for.

    Raises:
        SettingError: If it cannot.
    """
    settings = context.settings
    for name, allowed in (
        ("policy", COMPILED_POLICIES),
        ("read", ("live",)),
        ("batch", (1,)),
        ("deadline", (None,)),
    ):
        value = getattr(settings, name)
        if value not in allowed:
            raise SettingError(
                name,
                f"must be {' or '.join(map(repr, allowed))} for a compiled step, which comes back "
                f"to the event loop after many updates, got {value!r}",
            )
    if context.lane_settings.backend.name != "numba":
        raise SettingError(
            "backend", f"must be 'numba' for a compiled step, got {settings.backend!r}"
        )


def _checked_samples(samples: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], ...]:
    if not isinstance(samples, (list, tuple)) or not samples:
        raise TypeError(f"samples must be a tuple of at least one array, got {samples!r}")
    for index, array in enumerate(samples):
        check_type(f"samples[{index}]", array, np.ndarray)
        if array.ndim < 1 or len(array) != len(samples[0]) or not len(array):
            raise ValueError(
                f"samples must be arrays of one length, at least 1, got shapes "
                f"{[each.shape for each in samples]}"
            )
    return tuple(map(np.ascontiguousarray, samples))


def _checked_tables(shared: SharedParameters, tables: Mapping[str, int]) -> dict[str, int]:
    check_type("tables", tables, Mapping)
    if not tables:
        raise ValueError("tables must name at least one shared parameter, got none")
    for name, count in tables.items():
        if name not in shared.views or not shared.views[name].dim():
            known = ", ".join(each for each in shared.views if shared.views[each].dim())
            raise ValueError(f"tables must be among {known}, got {name!r}")
        if not shared.views[name].numel():
            raise ValueError(f"tables must have rows and columns, got {name!r} without elements")
        check_integer(f"tables[{name!r}]", count, at_least=1)
    return dict(tables)
