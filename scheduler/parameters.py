"""What all workers share: parameters and the state of updates, flat with named views; buffers."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import torch

from hogstream.kernels.backends.select import Backend
from hogstream.kernels.operands import COMPUTE_DTYPES, check_param
from hogstream.kernels.race_counters import RaceCounters
from hogstream.kernels.shared_memory import move_to_shared_memory
from hogstream.scheduler.buffers import Buffers, average_rows, buffers_of, fill_rows, make_rows
from hogstream.scheduler.checks import check_choice, check_integer
from hogstream.scheduler.forks import let_go_in_forks
from hogstream.scheduler.memory import allocate_zeros, save_parts_alone
from hogstream.scheduler.update_state import KINDS, UpdateState


class SharedParameters:
    """Flat parameters and the state of their updates, which every worker reads and updates.

    Attributes:
        flat: All parameters, shape (elements,), contiguous.
        state: Of shape (elements,), in the compute type: float64 for float64 parameters, else
            float32. At first that is ``ms``; a scheduler that is opened makes what its updates have
            more. Each starts at zero.
        worker_state: With ``state="per-worker"`` of a scheduler, each worker's own state, of shape
            (workers, elements); before, None.
        races: With ``telemetry=True`` of a scheduler, what races were counted; before, None.
        row_versions: With that on a CPU, the version that an update of rows made of each row last:
            int64, shape (rows,), of all parameters that have an axis, one after the other; before,
            None.
        row_races: With that on a GPU, by name of each table whose rows were updated or read, or
            of all over processes, what races of each row were counted, apart from ``races``.
        views: Each parameter by name: a view of ``flat`` in the parameter's shape.
        buffers: By name, what a module has besides parameters and workers share too, such as
            running statistics; of any dtype.
        worker_buffers: With ``buffers="worker"`` or ``"average"`` of a scheduler, each worker's own
            by name, of shape (workers, *shape); before, None.
        versions: How many updates the parameters have had from each process, int64, shape
            (processes + 1,) on the CPU; the first is of the process that made them. Only its
            process writes a slot.
        slot: Which of them is of this process.
        users: How many schedulers are open over them in this process.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], buffers: Buffers | None = None
    ) -> None:
        """Copies parameters into flat storage; the tensors given are left alone.

        Args:
            parameters: Name to tensor of any shape; one dtype (float16, bfloat16, float32 or
                float64) and one device for all.
            buffers: Name to tensor of any shape and dtype; None for none. They are not copied: the
                tensors given are those that workers share.

        Raises:
            TypeError: If there is something else than tensors in a mapping, a dtype cannot be
                updated, or dtypes differ.
            ValueError: If there are no parameters, devices differ, or a buffer is sparse.
            MemoryError: If they do not fit the device.
        """
        _check_tensors("parameters", parameters)
        self.buffers: Buffers = {} if buffers is None else buffers
        _check_tensors("buffers", self.buffers)
        for name, tensor in self.buffers.items():
            if tensor.layout != torch.strided:
                raise ValueError(f"{name} must be dense as a shared buffer, got {tensor.layout}")
        self.buffers = dict(self.buffers)
        if not parameters:
            raise ValueError("parameters must hold at least one tensor, got none")
        tensors = {name: tensor.detach() for name, tensor in parameters.items()}
        first_name, first = next(iter(tensors.items()))
        for name, tensor in tensors.items():
            check_param(tensor, name)
            if tensor.dtype != first.dtype:
                raise TypeError(f"{name} must be {first.dtype} as {first_name}, got {tensor.dtype}")
            if tensor.device != first.device:
                raise ValueError(
                    f"{name} must be on {first.device} as {first_name}, got {tensor.device}"
                )
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        elements = sum(tensor.numel() for tensor in tensors.values())
        self.flat = allocate_zeros("parameters", (elements,), first.dtype, first.device)
        with torch.inference_mode(False):
            torch.cat([tensor.reshape(-1) for tensor in tensors.values()], out=self.flat)
        self.state = UpdateState(
            allocate_zeros("ms", (elements,), COMPUTE_DTYPES[first.dtype], first.device)
        )
        self.worker_state: UpdateState | None = None
        self.races: RaceCounters | None = None
        self.row_versions: torch.Tensor | None = None
        self.row_races: dict[str, RaceCounters] = {}
        self.worker_buffers: Buffers | None = None
        self.versions = _make_versions(0)
        self.slot = 0
        self._attached = _no_modules()
        self._look()

    @classmethod
    def from_module(cls, module: torch.nn.Module) -> SharedParameters:
        """Makes what a module has shared: its parameters become views of the flat storage.

        Frozen parameters are there too, so that they can be unfrozen; updates leave them alone.
        The module's buffers, such as running statistics, are shared as they are, also those that
        its ``state_dict`` leaves out: what workers make of them is in the module. Sparse ones are
        not shared: each copy of the module has its own. See ``attach`` for what its ``state_dict``
        holds; ``load_state_dict`` writes into the shared memory, so between runs.

        Raises:
            TypeError: If ``module`` is not one, a dtype cannot be updated, or dtypes differ.
            ValueError: If the module has no parameters, or devices differ, or it was made in
                inference mode.
        """
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        shared = cls(dict(module.named_parameters()), buffers_of(module))
        shared.attach(module)
        return shared

    def _look(self) -> None:
        """Makes the views of what has been made, or has come from another process."""
        with torch.inference_mode(False):
            self.views: Mapping[str, torch.Tensor] = MappingProxyType(self.views_of(self.flat))
        self._versions = self.versions.numpy().data
        self.users = 0
        self._landing = threading.Lock()
        let_go_in_forks(self)

    def let_go(self) -> None:
        """Forgets who uses them, in a child of ``os.fork``, unless the memory is shared."""
        if not self.flat.is_shared():
            self.users = 0
        self._landing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process, or into a copy: all but the views, and who is attached."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("views", "users", "_versions", "_landing", "_attached")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what has come from another process: the same memory, if it is shared."""
        vars(self).update(state)
        self._attached = _no_modules()
        self._look()

    @property
    def elements(self) -> int:
        """How many parameters there are, counted one by one."""
        return self.flat.numel()

    @property
    def ms(self) -> torch.Tensor:
        """Running mean of squared gradients, shape (elements,)."""
        return self.state.ms

    @property
    def grad_avg(self) -> torch.Tensor | None:
        """Running mean of gradients, shape (elements,); None before updates were centered."""
        return self.state.grad_avg

    @property
    def momentum_buffer(self) -> torch.Tensor | None:
        """Shape (elements,); None before updates had momentum."""
        return self.state.momentum_buffer

    @property
    def worker_ms(self) -> torch.Tensor | None:
        """Each worker's own ``ms``, shape (workers, elements); None if there are none."""
        return None if self.worker_state is None else self.worker_state.ms

    @property
    def version(self) -> int:
        """How many updates the parameters have had."""
        versions = self._versions
        return versions[0] if len(versions) == 1 else sum(versions)

    def land(self, read_version: int) -> int:
        """Counts an update of this process; from any thread.

        Args:
            read_version: Version of the parameters that it was made from.

        Returns:
            Its staleness.
        """
        with self._landing:
            staleness = self.version - read_version
            self._versions[self.slot] += 1
        return staleness

    def make_state(self, kinds: Collection[str] = KINDS) -> UpdateState:
        """``ms`` and other kinds of state: made of zeros if it is not there, the same later.

        Args:
            kinds: What of ``grad_avg`` and ``momentum_buffer``.

        Raises:
            SettingError: If there is no such kind.
            RuntimeError: If one would have to be made in a process that others share ``ms`` with.
            MemoryError: If they do not fit the device.
        """
        missing = _missing(self.state, kinds)
        if missing and self.slot:
            raise RuntimeError(
                f"shared must have {' and '.join(missing)} before it is sent to a process, which "
                f"would have its own: call make_state where it is made"
            )
        made = {kind: self._zeros(kind, self.ms.shape) for kind in missing}
        self.state = self.state._replace(**made)
        return self.state.only(kinds)

    def make_worker_state(self, workers: int, kinds: Collection[str] = KINDS) -> UpdateState:
        """Each worker's own ``ms`` and other kinds: made of zeros if not there, the same later.

        Args:
            workers: How many.
            kinds: What of ``grad_avg`` and ``momentum_buffer``.

        Raises:
            ValueError: If it was made for another number of workers, or there is no such kind.
            MemoryError: If it does not fit the device.
        """
        workers = check_integer("workers", workers, at_least=1)
        shape = torch.Size((workers, self.elements))
        state = self.worker_state or UpdateState(self._zeros("worker_ms", shape))
        if len(state.ms) != workers:
            raise ValueError(
                f"workers must be {len(state.ms)}, as many as have an ms, got {workers}"
            )
        made = {kind: self._zeros(f"worker_{kind}", shape) for kind in _missing(state, kinds)}
        self.worker_state = state._replace(**made)
        return self.worker_state.only(kinds)

    def make_worker_ms(self, workers: int) -> torch.Tensor:
        """Each worker's own ``ms`` alone, for updates without momentum that are not centered.

        Args:
            workers: How many.

        Raises:
            ValueError: As ``make_worker_state``.
            MemoryError: As ``make_worker_state``.
        """
        return self.make_worker_state(workers, ()).ms

    def make_worker_buffers(self, workers: int, *, kept: bool = True) -> Buffers:
        """Each worker's own buffers: made as copies of ``buffers`` if not there, the same later.

        Args:
            workers: How many.
            kept: Whether what they hold matters. If not, and no scheduler is open, others are made
                in the place of those for another number of workers.

        Raises:
            ValueError: If they were made for another number of workers.
            MemoryError: If they do not fit the device.
        """
        workers = check_integer("workers", workers, at_least=1)
        counts = {len(rows) for rows in (self.worker_buffers or {}).values()} - {workers}
        if counts and (kept or self.users):
            raise ValueError(
                f"workers must be {counts.pop()}, as many as have buffers, got {workers}"
            )
        if self.worker_buffers is None or counts:
            self.worker_buffers = make_rows(self.buffers, workers)
        return self.worker_buffers

    def reset_worker_buffers(self) -> None:
        """Has each worker's own buffers, in this process, begin again as copies of ``buffers``."""
        assert self.worker_buffers is not None
        fill_rows(self.worker_buffers, self.buffers)

    def average_worker_buffers(self, updates: Sequence[int]) -> None:
        """Writes the mean of the workers' own buffers into ``buffers``.

        Integers and booleans, which have no mean, come from the worker that had most updates.

        Args:
            updates: How many updates each worker had; those that had none are left out.
        """
        assert self.worker_buffers is not None
        average_rows(self.worker_buffers, self.buffers, updates)

    def _zeros(self, name: str, shape: torch.Size) -> torch.Tensor:
        return allocate_zeros(name, tuple(shape), self.ms.dtype, self.ms.device)

    def count_races(self, block: int) -> RaceCounters:
        """The counters of races: made at the first call, the same later.

        Args:
            block: How many elements are counted together, as the backend wants it.

        Raises:
            ValueError: If they were made for blocks of another size.
            MemoryError: If they do not fit the device.
        """
        if self.races is None:
            shape = RaceCounters.zeros(self.elements, block, "meta").counts.shape
            counts = allocate_zeros("races", tuple(shape), torch.int64, self.flat.device)
            self.races = RaceCounters(self.elements, block, counts)
        if self.races.block != block:
            raise ValueError(
                f"block must be {self.races.block}, for which races are counted, got {block}"
            )
        return self.races

    def count_races_with(self, backend: Backend, block: int | None = None) -> RaceCounters:
        """The counters of races, in blocks as a backend that counts them takes them.

        Those that are there already count on, on a CPU also if their blocks are smaller. Larger
        ones are made anew there: what is locked by smaller blocks would seem to be lost.

        Args:
            backend: It.
            block: How many elements are counted together, on a CPU; None for what it is best at.

        Raises:
            ValueError: If they were made for blocks of another size, on a GPU; or for larger ones
                and are shared with other processes.
            MemoryError: If they do not fit the device.
        """
        assert backend.race_block is not None
        wanted = block or backend.race_block(self.flat.dtype, self.flat.device)
        if self.races is not None and self.flat.device.type == "cpu":
            if self.races.block <= wanted:
                return self.races
            if not self.races.counts.is_shared():
                self.races = None
        return self.count_races(wanted)

    @property
    def race_counters(self) -> list[RaceCounters]:
        """All counters of races that there are: of blocks of everything, and of rows."""
        return [*([] if self.races is None else [self.races]), *self.row_races.values()]

    def count_stale_rows(self) -> None:
        """Makes ``row_versions``, of zeros, if they are not there; for a CPU.

        Raises:
            MemoryError: If they do not fit.
        """
        if self.row_versions is None:
            rows = sum(shape[0] for shape in self._shapes.values() if shape)
            device = self.flat.device
            self.row_versions = allocate_zeros("row_versions", (rows,), torch.int64, device)

    def count_races_of_rows(self, name: str) -> RaceCounters:
        """The counters of races of a table's rows, one by one: made at the first call.

        Args:
            name: Of a parameter of an axis or more.

        Raises:
            MemoryError: If they do not fit the device.
        """
        if name not in self.row_races:
            rows, device = self._shapes[name][0], self.flat.device
            counts = allocate_zeros("row_races", (3, rows), torch.int64, device)
            self.row_races = {**self.row_races, name: RaceCounters(rows, 1, counts)}
        return self.row_races[name]

    def share_memory_(self, processes: int) -> None:
        """Moves everything to where other processes can reach it; views and modules follow.

        Pickled then, as for a process of ``torch.multiprocessing``, they are the same memory there
        (over CUDA's inter-process handles, on a GPU). State and counts that are made later are not
        shared: ``make_state`` makes it before. No scheduler may be open: its lanes, or its
        processes, would go on in the old place.

        Args:
            processes: How many others there may be; each writes a slot of ``versions``.

        Raises:
            RuntimeError: If a scheduler is open, or there is no room; nothing has changed then.
        """
        if self.users:
            raise RuntimeError(
                f"shared must not move while a scheduler is open over it, and {self.users} are: "
                f"leave their scopes first"
            )
        processes = check_integer("processes", processes, at_least=1)
        versions = _make_versions(processes)
        versions[0] = self.version
        tensors = [self.flat, *self.state.named().values(), versions]
        tensors += [] if self.worker_state is None else self.worker_state.named().values()
        tensors += [] if self.races is None else [self.races.counts]
        tensors += [] if self.row_versions is None else [self.row_versions]
        tensors += [each.counts for each in self.row_races.values()]
        tensors += [*self.buffers.values(), *(self.worker_buffers or {}).values()]
        move_to_shared_memory(tensors)
        self.versions = versions
        self._look()

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """If the block fails, what was made in it is dropped again: state, counts, buffers."""
        names = "state", "worker_state", "races", "row_versions", "row_races", "worker_buffers"
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def enter_process(self, process: int) -> None:
        """Says which of the others this process is: what it works on then is its own part.

        That is a slot of ``versions``, and its workers' rows of ``worker_state`` and
        ``worker_buffers``.

        Args:
            process: Its number among those of ``share_memory_``, from 0.

        Raises:
            ValueError: If there is none of that number.
        """
        processes = len(self.versions) - 1
        process = check_integer("process", process, at_least=0, at_most=processes - 1)
        self.slot = process + 1
        if self.worker_state is not None:
            self.worker_state = self.worker_state.map(
                lambda each: each.tensor_split(processes)[process]
            )
        if self.worker_buffers is not None:
            self.worker_buffers = {
                name: rows.tensor_split(processes)[process]
                for name, rows in self.worker_buffers.items()
            }

    def attach(
        self,
        module: torch.nn.Module,
        views: Mapping[str, torch.Tensor] | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        """Re-points a module's parameters and buffers into the shared memory.

        Their old values are dropped. The module's tensors stay its own: those that are tied stay
        tied. If no buffers are shared, it keeps its own.

        Its ``state_dict`` holds the parameters' and buffers' own memory, and is saved as what it
        is: that of one layer as one layer, also by safetensors. Sent to another process it is a
        copy, so send the module or the shared parameters.

        Args:
            module: With the names, shapes, dtypes and device of what is shared, such as a deep copy
                of the module that it was made from.
            views: Where to point the parameters instead: a worker's snapshot, say, by name.
            buffers: Where to point the buffers instead: a worker's own, say, by name.

        Raises:
            ValueError: If a name, shape, dtype or device differs, or it was made in inference mode;
                the module is left as it was.
        """
        parameters = dict(module.named_parameters())
        _check_fits("parameters", self.views, parameters)
        own = buffers_of(module) if self.buffers else {}
        _check_fits("buffers", self.buffers, own)
        for name, parameter in parameters.items():
            parameter.data = self.views[name] if views is None else views[name]
        for name, buffer in own.items():
            buffer.data = self.buffers[name] if buffers is None else buffers[name]
        save_parts_alone(module)
        if views is None and buffers is None:
            self._attached[id(module)] = module
        else:
            self._attached.pop(id(module), None)

    def check_still_attached(self, module: torch.nn.Module) -> None:
        """Checks that a module that was attached is in the shared memory as it was then.

        ``load_state_dict(assign=True)``, another layer or ``.data``, or another dtype and back move
        it to memory of its own, and a second ``from_module`` moves it to that of others. One that
        was never attached, such as a copy, or was pointed elsewhere by ``views`` or ``buffers``, is
        left alone.

        Args:
            module: Whatever module.

        Raises:
            ValueError: If a name, shape, dtype or device is another now.
            RuntimeError: If a parameter or buffer is elsewhere; the first is named.
        """
        if self._attached.get(id(module)) is not module:
            return
        parameters = dict(module.named_parameters())
        _check_fits("parameters", self.views, parameters)
        own = buffers_of(module) if self.buffers else {}
        _check_fits("buffers", self.buffers, own)
        for what, mine, theirs in (
            ("parameter", self.views, parameters),
            ("buffer", self.buffers, own),
        ):
            for name, tensor in theirs.items():
                if tensor.data_ptr() != mine[name].data_ptr():
                    raise RuntimeError(
                        f"model must be in the shared memory that it was attached to, where "
                        f"updates reach it, got {what} {name} elsewhere: attach it again by "
                        f"shared.attach(model), and it has the shared values; or, to keep its own, "
                        f"make others by SharedParameters.from_module(model)"
                    )

    def views_of(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a flat tensor by parameter name: of a gradient, say, or a snapshot.

        Args:
            flat: Shape (elements,).
        """
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), flat.split(sizes), strict=True)
        }


def _no_modules() -> WeakValueDictionary[int, torch.nn.Module]:
    """By their ids, as a module may be of a class that has no hash."""
    return WeakValueDictionary()


def _missing(state: UpdateState, kinds: Collection[str]) -> list[str]:
    for kind in kinds:
        check_choice("each of kinds", kind, KINDS)
    return [kind for kind in kinds if kind not in state.named()]


def _check_tensors(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{what} must map names to tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(tensor).__name__}")


def _check_fits(
    what: str, mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> None:
    """Checks that what a module has can be pointed to what is shared."""
    if theirs.keys() != mine.keys():
        differing = sorted(theirs.keys() ^ mine.keys())
        raise ValueError(f"module must have the shared {what}' names; {differing} differ")
    for name, tensor in theirs.items():
        wanted, got = _signature(mine[name]), _signature(tensor)
        if wanted != got:
            raise ValueError(f"{name} must be {wanted} as the shared one, got {got}")
        if tensor.is_inference():
            raise ValueError(
                f"{name} must not be an inference tensor: make the module outside of "
                f"torch.inference_mode(), or copy it there"
            )


def _signature(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _make_versions(processes: int) -> torch.Tensor:
    """A slot of this process and one of each other."""
    shape, device = (processes + 1,), torch.device("cpu")
    return allocate_zeros("versions", shape, torch.int64, device)
