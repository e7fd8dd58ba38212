"""How a scheduler runs: its settings, described here and nowhere else, which check themselves."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from hogstream.kernels.backends.select import Backend, available_backends, select_backend
from hogstream.kernels.hyperparameters import HYPERPARAMETERS, Hyperparameters
from hogstream.scheduler.checks import (
    SettingError,
    check_choice,
    check_integer,
    check_number,
    check_switch,
    check_type,
)
from hogstream.scheduler.policies import select_policy


def _option(default: Any, text: str) -> Any:
    """A setting that commands have an option for, and its help."""
    return field(default=default, metadata={"help": text})


def _choice(*choices: str, text: str) -> Any:
    """The same of one that is one of some words, the first by default."""
    return field(default=choices[0], metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """How a scheduler runs.

    Attributes:
        workers: How many, at least 1; over processes, how many each has.
        policy: What an update waits for. ``"lock-free"``: nothing. ``"locked"``: a mutex, which its
            lane holds around it alone. ``"ordered"``: the update before it, on the device.
            ``"awaited"``: an asyncio lock, held until the event loop has seen it land.
            ``"bounded:K"``: its staleness to be at most K, among updates of one scheduler.
            ``"row-locked"``: at each row, a lock that is held around the update of that row alone.
            All updates are of rows then, by ``submit_rows``, in one process; on a CPU, with Numba.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.
        hyperparameters: What updates are made with. Momentum, and centered updates, have a state
            of their own, which the scheduler makes when it is opened.
        depth: How many updates of one worker may be in flight, at least 1. A worker needs as many
            gradient buffers.
        batch: How many updates are launched at once, at least 1. On a GPU, those of the same lanes
            and gradients as some before are one CUDA graph, which pays where an update is not worth
            a launch of its own; not with ``staleness_aware``.
        batch_of: ``"lane"``: a batch is of one worker's updates, at most ``depth``, one after the
            other. ``"lanes"``: it is of all workers' updates, at most ``depth`` times ``workers``,
            each down its lane, beside each other.
        state: ``"shared"``: one ``ms`` for all, as RMSpropAsync, and so for what else updates have.
            ``"per-worker"``: each its own, as A3C's unshared RMSProp (Mnih et al. 2016, arXiv
            1602.01783).
        read: ``"live"``: workers read parameters that change under them (Hogwild).
            ``"snapshot"``: they read a copy, made at the start of each iteration (A3C).
        buffers: What workers' replicas of a model have for its buffers, such as BatchNorm's running
            statistics. ``"shared"``: all have the model's own, which change under them as live
            parameters do. ``"worker"``: each its own, kept for its next run; the model's stay as
            they were. ``"average"``: each its own, which begin a run as the model's, and of which
            the model's are the mean when it ends (of integers and booleans, those of the worker
            that made most updates).
        staleness_aware: Divide ``lr`` by an update's staleness (Zhang et al. 2016, arXiv
            1511.05950) as it is known when its lane begins with it.
        telemetry: Count lost updates in the kernel.
        on_error: When a worker fails or its process dies: ``"stop"`` all, let the others
            ``"continue"``, or ``"restart"`` it too, unless it failed three times without an update
            in between. A run that all have left so before its updates were made is an error.
        on_nonfinite: When a gradient holds an infinity or NaN: ``"apply"`` it, ``"skip"`` it, or
            skip it and ``"raise"`` an error in its worker. The kernel finds it.
        deadline: How many seconds a worker may take between two waits for the scheduler or
            landings, > 0: then it is cancelled, and has failed. None: any time. A worker that
            blocks the event loop cannot be cancelled: let it block in ``run_blocking``, or in a
            process of ``ProcessScheduler``, which is killed if it shows no sign of life for so
            long.

    Raises:
        TypeError: If a setting is of a wrong type.
        SettingError: If a name is unknown, a number is out of range, or ``batch`` does not go with
            the policy or depth.
    """

    workers: int
    policy: str = "lock-free"
    backend: str | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    depth: int = _option(1, "How many updates of one worker may be in flight.")
    batch: int = _option(1, "How many updates are launched at once.")
    batch_of: str = _choice("lane", "lanes", text="A batch is of one worker, or of all.")
    state: str = _choice("shared", "per-worker", text="One ms for all, or each worker its own.")
    read: str = _choice("live", "snapshot", text="Workers read live parameters, or a copy.")
    buffers: str = _choice(
        *("shared", "worker", "average"),
        text="Workers share a model's buffers, have their own, or their own that are averaged.",
    )
    staleness_aware: bool = _option(False, "Divide lr by the staleness of each update.")
    telemetry: bool = _option(False, "Count lost updates in the kernel.")
    on_error: str = _choice(
        *("stop", "continue", "restart"),
        text="When a worker fails: stop all, go on without it, or start it again.",
    )
    on_nonfinite: str = _choice(
        *("apply", "skip", "raise"),
        text="When a gradient is not finite: apply it, skip it, or fail its worker.",
    )
    deadline: float | None = _option(
        None, "A worker that takes longer between two waits has failed."
    )

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"policy": select_policy(self.policy).name}
        for name in ("workers", "depth", "batch"):
            checked[name] = check_integer(name, getattr(self, name), at_least=1)
        for name in ("staleness_aware", "telemetry"):
            check_switch(name, getattr(self, name))
        for each in OPTIONS:
            if "choices" in each.metadata:
                check_choice(each.name, getattr(self, each.name), each.metadata["choices"])
        if self.deadline is not None:
            checked["deadline"] = check_number("deadline", self.deadline, above=0)
        if self.backend is not None:
            check_choice("backend", self.backend, tuple(available_backends()))
        check_hyperparameters(self.hyperparameters)
        for name, value in checked.items():  # NumPy's numbers as Python's
            object.__setattr__(self, name, value)
        self._check_batch()

    @classmethod
    def make(cls, settings: SchedulerSettings | None, values: dict[str, Any]) -> SchedulerSettings:
        """What a scheduler was given: settings, values in the place of some of theirs, or both.

        Args:
            settings: None for the defaults.
            values: By name: settings, and hyperparameters beside them.

        Raises:
            TypeError: If a name is unknown, a value is missing or one is of a wrong type.
            ValueError: If a value is not allowed.
        """
        own = {name: values[name] for name in values if name in _NAMES}
        numbers = {name: values[name] for name in values if name not in _NAMES}
        if unknown := numbers.keys() - set(HYPERPARAMETERS):
            allowed = ", ".join(name for name in HYPERPARAMETERS if name not in _REFUSED)
            raise TypeError(
                f"hyperparameters must be among {allowed}, got {sorted(unknown)}; and settings "
                f"among {', '.join(_NAMES)}"
            )
        if settings is not None:
            check_type("settings", settings, cls)
        if numbers:
            before = Hyperparameters() if settings is None else settings.hyperparameters
            own["hyperparameters"] = replace(own.get("hyperparameters", before), **numbers)
        return cls(**own) if settings is None else replace(settings, **own)

    def with_policy(self, policy: str) -> SchedulerSettings:
        """These with another policy; without batches, if it takes none, to be compared even so.

        Args:
            policy: Its name.
        """
        batch = self.batch if select_policy(policy).takes_batches else 1
        return replace(self, policy=policy, batch=batch)

    def select_backend(self, device_type: str) -> Backend:
        """The backend on a type of device.

        Args:
            device_type: Where the parameters are, as ``torch.device.type``.

        Raises:
            ValueError: If it cannot take tensors of that device.
            RuntimeError: If it is not available here.
            SettingError: If it cannot count races, and there is ``telemetry``; or cannot lock rows,
                and the policy does.
        """
        backend = select_backend(self.backend, device_type)
        if self.telemetry and not backend.counts_races:
            raise SettingError(
                "telemetry",
                f"needs a backend that counts races (triton or numba), got {backend.name!r}",
            )
        locks_rows = backend.name == "numba" or device_type == "cuda"
        if select_policy(self.policy).row_locked and not locks_rows:
            raise SettingError(
                "policy",
                f"must be another than {self.policy} with backend {backend.name!r} on a "
                f"{device_type}: numba alone locks rows there",
            )
        return backend

    def options(self) -> dict[str, Any]:
        """The values of those that commands have an option for, by name."""
        return {each.name: getattr(self, each.name) for each in OPTIONS}

    def _check_batch(self) -> None:
        most = self.depth * (self.workers if self.batch_of == "lanes" else 1)
        if self.batch > most:
            raise SettingError(
                "batch",
                f"must be an integer <= {most}, as many updates as may be in flight, "
                f"got {self.batch}",
            )
        if self.batch > 1 and not select_policy(self.policy).takes_batches:
            raise SettingError(
                "batch",
                f"must be 1 with policy {self.policy!r}, which waits for each update, "
                f"got {self.batch}",
            )


def check_hyperparameters(hyperparameters: Hyperparameters) -> None:
    """Checks that they are such, and that lanes can do what they say.

    Raises:
        TypeError: If they are something else.
        SettingError: If parameters would be rounded otherwise than to nearest.
    """
    check_type("hyperparameters", hyperparameters, Hyperparameters)
    for name in _REFUSED:
        if getattr(hyperparameters, name):
            raise SettingError(
                name, "must be False in a scheduler, whose updates round to nearest, got True"
            )


# Hyperparameters that lanes do not have, of which only False is taken.
_REFUSED = ("stochastic_rounding", "kahan_sum")
_NAMES = tuple(each.name for each in fields(SchedulerSettings))

#: The settings that commands have an option for. A field's metadata has its ``help``, and its
#: ``choices`` if it is one of some words.
OPTIONS: tuple[Field[Any], ...] = tuple(
    each for each in fields(SchedulerSettings) if "help" in each.metadata
)
