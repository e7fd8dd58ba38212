"""RMSprop for asynchronous training, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import wraps
from operator import is_, itemgetter
from types import NoneType
from typing import Any, NamedTuple, overload

import torch
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from hogstream.kernels.backends.select import check_backend, select_backend
from hogstream.kernels.hyperparameters import HYPERPARAMETERS
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import check_param
from hogstream.kernels.rounding import key_of_step
from hogstream.kernels.rows import RowUpdate
from hogstream.kernels.shared_memory import move_to_shared_memory
from hogstream.optim.differentiable import differentiable_step
from hogstream.optim.flat_buffers import FlatBuffer, check_movable, make_flat_buffers
from hogstream.optim.grad_factor import Scaling, check_max_grad_norm, scaling_of
from hogstream.optim.interchange import readable
from hogstream.optim.options import NOT_HONOURED, check_group
from hogstream.optim.parameters import needs_state, own_part
from hogstream.optim.row_steps import RowStep, are_by_rows, params_by_rows, row_steps, without
from hogstream.optim.state import (
    BUFFERS,
    STATE,
    Kinds,
    as_real,
    as_saved,
    check_loadable,
    first_value,
    is_outgrown,
    made_to_fit,
    pair,
)
from hogstream.optim.step_counts import (
    counters_of,
    counts_in_use,
    exact_count,
    gather_steps,
    new_counts,
)
from hogstream.optim.step_in_graph import unwrapped_in_graphs
from hogstream.optim.step_plan import PlannedLaunch, PlannedStep, StepPlan, make_plan

# ``torch.compiler.disable``, but that would import the compiler with this module: seconds.
_not_compiled = torch._disable_dynamo  # type: ignore[attr-defined]
# Autograd counts this up with each operation that a backward may go through.
_graph_position: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
# What is pickled besides what torch knows of.
_OWN = ("backend", "capturable", "max_grad_norm", "_counts")
_options_of = itemgetter(
    *HYPERPARAMETERS, "rowwise", "lazy_decay", "differentiable", "capturable", "foreach", "seed"
)
# A profiler may look at this thread alone, or at all: then torch's module says so.
_is_profiled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


class _Settings(NamedTuple):
    """What a group's options come to.

    Attributes:
        keys: Those of the group.
        values: The options.
        taken: What a launch takes for them after its table.
        kinds: What state its updates take.
    """

    keys: list[str]
    values: tuple[Any, ...]
    taken: tuple[Any, ...]
    kinds: Kinds


def _with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step as torch's wrapper makes it, which is left out where nobody would notice.

    It marks the step for profilers and calls hooks. Where there are none it takes a third of the
    time of a small step, after a backward that has evicted its code.
    """
    marked = Optimizer.profile_hook_step(step)

    @wraps(step)
    def hooked_step(self: RMSpropAsync, *args: Any, **kwargs: Any) -> Any:
        noticed = (
            _is_profiled()
            or profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        try:
            # torch wraps the step of a subclass itself, which calls the hooks then.
            if noticed and type(self).step is RMSpropAsync.step:
                return marked(self, *args, **kwargs)
            return step(self, *args, **kwargs)
        except BaseException:
            # ``GradScaler`` leaves them behind then, and would multiply the next scale by this one.
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise

    hooked_step.hooked = True  # type: ignore[attr-defined]  # else torch wraps it once more
    return hooked_step


class RMSpropAsync(Optimizer):
    """RMSprop with epsilon inside the root, and state that may be shared between workers.

    Per parameter, with ``ms`` (``state["square_avg"]``) starting at zero::

        ms    = alpha*ms + ((1 - alpha)*grad)*grad
        param = param - (lr*grad) / sqrt(ms + eps)

    as in ChainerRL's ``RMSpropAsync``: the non-centered "shared RMSProp" of Mnih et al. 2016
    (arXiv 1602.01783). Every backend gives the same bits.

    ``momentum`` and ``centered`` are as in torch; ``RMSprop`` is this class with the arguments and
    defaults of torch. A complex parameter is updated as its real and imaginary parts.

    State is made here, not at the first step, so that it can be shared before workers start: of
    parameters that require gradients and have memory. One that is frozen, lazy or on the meta
    device may be of any kind, and has no state until a step finds a gradient of it. Its
    names are those of ``torch.optim.RMSprop``: ``step`` (float32 scalar, the nearest to the count
    beyond 2^24), ``square_avg``, ``momentum_buffer`` if there is momentum, and ``grad_avg`` if
    centered (shape of the parameter; float64 for float64 parameters, else float32; complex of
    complex ones). State that has been removed (``state.clear()``), or that a parameter put into a
    group by hand has not, is made by the next step, and what no longer fits a parameter's dtype,
    device or layout is made anew with its values; not where it is shared with other processes,
    which would not see it. A parameter whose gradient is None is left alone, its state too.

    A sparse gradient, as of ``nn.Embedding(sparse=True)``, updates its rows alone, by
    ``sparse_rmsprop_``: those of the same row are summed first, and all others stay as they are,
    state and weight decay included. So it costs what it touches. Its parameter must be contiguous.

    Parameters that share memory, and one that is in a group twice, are updated one after the other.
    Of a ``DTensor`` (FSDP2, tensor parallel) each process updates its own part, and its state is
    one too; a gradient that is placed otherwise is brought to its parameter's placements first.

    Keys of groups that are no options are left to their users, but not one that is an option
    misspelt, or one of other optimizers that would be ignored: those are refused.

    ``torch.compile`` leaves all methods as they are, between its graphs. Within one,
    ``step.__wrapped__.__wrapped__`` is an operator that does the same, slower: as of torch's
    optimizers, without hooks, and with steps that count up to 2^24. It writes copies back, so
    it is not for state that others update at the same time.

    Args:
        params: Parameters, named parameters or groups; float16, bfloat16, float32, float64 or
            complex.
        lr: Learning rate, finite and >= 0, or a tensor of one element, which may be changed in
            place; this and the numbers that follow must be ones that the compute type can hold: not
            rounded to infinity, or to 0 without being 0.
        alpha: Decay of ``ms``, in [0, 1].
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
        momentum: Decay of the momentum buffer, finite and >= 0; 0 for none.
        centered: Divide by the standard deviation: ``ms`` less the square of the mean gradient, or
            0 where that is less than 0.
        lr_in_momentum: The buffer takes steps that have been multiplied by ``lr``, as
            TensorFlow's; if false, ``lr`` multiplies the buffer, as torch's.
        initial_accumulator_value: What ``ms`` starts at, finite and >= 0. TensorFlow's RMSprop, and
            timm's ``RMSpropTF``, are this at 1 with ``lr_in_momentum``.
        eps_inside_sqrt: If false, divide by ``sqrt(ms) + eps``, as ``torch.optim.RMSprop``.
        decoupled_weight_decay: Shrink the parameter by ``1 - lr*weight_decay`` instead of adding
            ``weight_decay*param`` to the gradient.
        maximize: Ascend the gradient.
        rowwise: Keep one ``ms`` for each row of a parameter (its first axis): of the mean of the
            squares over the row, ``state["square_avg"]`` of shape (N,). Not with ``centered``.
        lazy_decay: ``ms``, and the mean gradient, of a row that steps have passed by decay by
            ``alpha`` for each of them, when it is touched again: as if each had brought a gradient
            of 0. ``state["last_update"]`` has the step that touched each row last: int64, shape
            (N,). Not with ``momentum``, whose buffer would have moved such a row.
        stochastic_rounding: Round parameters of 16 bits up or down by chance: so a step that is
            smaller than half of their last place moves them in the mean. The same bits come of the
            same ``seed`` on every backend, also in a run that is resumed; others with ``flat``.
            With a loss scale on a GPU the host waits there once a launch.
        seed: For ``stochastic_rounding``: an integer of 64 bits.
        kahan_sum: Keep what rounding leaves of parameters of 16 bits in ``state["kahan_comp"]``, of
            their dtype, and add it at the next step. Who overwrites such parameters sets it to 0.
        max_grad_norm: Multiply all gradients by one factor, so that their norm over all groups is
            at most this, as ``torch.nn.utils.clip_grad_norm_`` does; the gradients stay as they
            are. Finite and > 0, or None. It is kept in an attribute, not in the state.
        foreach: True, False or None, as torch has it: it changes nothing here.
        differentiable: Update by torch's own operations, which autograd may go through, ``lr``
            included. Their roots are not rounded to nearest, so the last bits may differ.
        capturable: Keep ``lr`` and ``step`` on the device, so that ``step()`` may be captured in a
            CUDA graph. ``group["lr"]`` is then a tensor there, float64 unless another was given,
            which torch's schedulers, or ``fill_``, change in place, replays included; the host
            can't check it. What else a group holds is captured as it is. Needs Triton, one device a
            group, and a step before the first capture, which compiles.
        flat: Move the parameters of a group that require gradients, and gradients for all of them,
            into one piece of memory each: a step is then one launch without a table. Gradients
            stay where they are: ``zero_grad()`` sets them to zero and not to None, so a parameter
            that a loss does not reach is updated with zero. One that requires no gradient any more
            is left alone: its zeros become None. A gradient that leaves the flat memory
            (``param.grad = ...``, ``model.zero_grad()``) is read all the same, through the table,
            until the next ``zero_grad()``; so is a parameter whose ``data`` is replaced
            (``model.to()``, ``model.share_memory()``), from then on. A copied or unpickled
            optimizer is not flat.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.

    Raises:
        TypeError: If a parameter or number is of a wrong type or dtype.
        ValueError: If a parameter that requires a gradient cannot be updated in place, or moved if
            ``flat`` (where it shares memory with another, or with other processes, has none yet or
            is distributed); a number is out of range; options do not go together; a group's key is
            an option that is not honoured; ``backend`` is unknown or cannot take a parameter's
            device; or ``capturable`` cannot be honoured for a group.
        RuntimeError: If ``backend`` is not available here.
    """

    # As torch's ``GradScaler`` sets them, for one step.
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``GradScaler`` leaves it to the step to unscale gradients, or to be left out."""
        return not any(group["differentiable"] for group in self.param_groups)

    @_not_compiled
    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        momentum: float = 0,
        centered: bool = False,
        lr_in_momentum: bool = False,
        initial_accumulator_value: float = 0,
        eps_inside_sqrt: bool = True,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        rowwise: bool = False,
        lazy_decay: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        kahan_sum: bool = False,
        max_grad_norm: float | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
        flat: bool = False,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        if not isinstance(flat, bool):
            raise TypeError(f"flat must be True or False, got {flat!r}")
        if differentiable and (flat or max_grad_norm is not None):
            name, off = ("flat", False) if flat else ("max_grad_norm", None)
            raise ValueError(
                f"{name} must be {off} with differentiable=True, which goes through torch's "
                f"operations one parameter at a time, got {flat or max_grad_norm}"
            )
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "lr_in_momentum": lr_in_momentum,
            "initial_accumulator_value": initial_accumulator_value,
            "eps_inside_sqrt": eps_inside_sqrt,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "rowwise": rowwise,
            "lazy_decay": lazy_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "kahan_sum": kahan_sum,
            "foreach": foreach,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        check_group({**defaults, "params": []})
        check_max_grad_norm(max_grad_norm)
        self.backend, self.flat, self.capturable = backend, False, capturable
        self.max_grad_norm = max_grad_norm
        self._shared = False  # whether other processes may know the state
        self._counts: list[torch.Tensor] = []  # from ``new_counts``, of which steps are views
        self._plan: StepPlan | None = None
        self._by_rows: dict[int, torch.Tensor] = {}  # parameters that no plan is for, by their ids
        self._flat_buffers: list[list[FlatBuffer]] = []  # of each group
        self._graph = 0  # how far autograd's graphs were when flat gradients were set to zero
        self._settings: dict[int, _Settings] = {}  # of groups, whose options stay as they are
        super().__init__(params, defaults)
        self.flat = flat
        if flat:  # only now, when no group can be refused any more
            check_movable(self.param_groups)
            self._flat_buffers = self._make_flat(self.param_groups)
            self._graph = _graph_position()

    @_not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, and makes their state.

        Args:
            param_group: ``{"params": ...}``, and any hyperparameter that differs from the defaults.

        Raises:
            TypeError: As for the class.
            ValueError: As for the class, or if a parameter is in another group already.
            RuntimeError: If no backend is available for a parameter's device.
        """
        params = param_group["params"]
        if isinstance(params, torch.Tensor):
            params = [params]
        elif not isinstance(params, set):  # which torch refuses, as it has no order
            params = list(params)  # an iterator may be read only once
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        # torch refuses anything that is not a tensor, in its own words.
        tensors = [each for each in tensors if isinstance(each, torch.Tensor)]
        index = len(self.param_groups)
        options = {**self.defaults, **param_group, "params": tensors}
        check_group(options)
        if options["capturable"] != self.capturable:
            raise ValueError(
                f"capturable of group {index} must be {self.capturable}, as of the optimizer, "
                f"got {options['capturable']}"
            )
        self._check_params(tensors)
        if self.flat:
            check_movable([*self.param_groups, options])
        super().add_param_group({**param_group, "params": params})
        group = self.param_groups[-1]
        with torch.inference_mode(False):  # whose tensors could not be changed elsewhere
            self._make_state(group, filter(needs_state, tensors))
            if self.capturable:
                group["lr"] = _lr_on(_device_of(group) or "cpu", group["lr"])
        self._flat_buffers += self._make_flat([group]) if self.flat else [[]]
        self._plan = None

    def _check_params(
        self, params: list[torch.Tensor], loaded: Collection[torch.Tensor] = ()
    ) -> None:
        """Checks those that need state, or have it in what is loaded."""
        checked = [
            (index, param)
            for index, param in enumerate(params)
            if needs_state(param) or param in loaded
        ]
        for index, param in checked:
            check_param(as_real(own_part(param)), f"param {index}")
            backend = select_backend(self.backend, param.device.type).name
            if self.capturable and backend != "triton":
                raise ValueError(
                    f"capturable=True needs the Triton backend, got {backend} for param {index} "
                    f"on {param.device}"
                )
            first = checked[0][1]
            if self.capturable and param.device != first.device:
                raise ValueError(
                    f"capturable=True needs one device a group, got {first.device} and "
                    f"{param.device} for param {index}"
                )

    def _make_state(self, group: dict[str, Any], lacking: Iterable[torch.Tensor]) -> None:
        """Makes what some parameters of one group lack of their state, or has been outgrown."""
        params = list(lacking)
        device = params[0].device if self.capturable and params else torch.device("cpu")
        counts = new_counts(len(params), device)
        self._counts.append(counts)
        for param, step in zip(params, counts[0], strict=True):
            state = self.state.setdefault(param, {})
            state.setdefault("step", step)
            kinds = Kinds.of_group(group)
            for name in kinds.buffers(param):
                if name not in state or is_outgrown(name, param, state, kinds):
                    made = state[name] = made_to_fit(state.get(name), param, name, group)
                    if name == "last_update":  # no step until now has passed a row by
                        made.fill_(exact_count(state["step"], self._counts))

    def _count_on(self, device: torch.device) -> None:
        """Has steps counted on a device, where alone it is known which are left out."""
        if all(counts.device == device for counts in self._counts):
            return
        self._make_missing_state()
        states = [state for state in self.state.values() if "step" in state]
        counts = new_counts(len(states), device)
        for state, step in zip(states, counts[0], strict=True):
            state["step"] = step.copy_(state["step"])
        self._counts, self._plan = [counts], None

    def _make_flat(self, groups: list[dict[str, Any]]) -> list[list[FlatBuffer]]:
        buffers = make_flat_buffers(groups)
        for buffer in (each for of_group in buffers for each in of_group):
            self._take_state_of(buffer, buffer.state)
        return buffers

    def _take_state_of(self, buffer: FlatBuffer, names: Iterable[str]) -> None:
        for name in names:
            for param, view in zip(buffer.params, buffer.state[name], strict=True):
                self.state.setdefault(param, {})[name] = view

    def _make_missing_state(self, loaded: Collection[torch.Tensor] = ()) -> None:
        """Makes the state of parameters that have not all of it, or not for what they are now.

        Somebody has removed it, has put the parameter into a group by hand, has unfrozen it, or has
        changed its dtype, device or layout: values are kept then.

        Args:
            loaded: Parameters that state is loaded for, frozen or not.

        Raises:
            TypeError: If such a parameter is of a wrong dtype.
            ValueError: If it cannot be updated in place.
            RuntimeError: If the state is shared with other processes. Nothing has changed then.
        """
        groups = self.param_groups
        lacking = [self._lacking_of(index, group, loaded) for index, group in enumerate(groups)]
        if any(lacking):
            with torch.inference_mode(False), torch.no_grad():
                self._make_states(lacking)

    def _make_states(self, lacking: list[list[torch.Tensor]]) -> None:
        """Makes what parameters of each group lack, in flat memory where all of it is lost."""
        for group, buffers, params in zip(
            self.param_groups, self._flat_buffers, lacking, strict=True
        ):
            kinds, to_make = Kinds.of_group(group), set(params)
            for place, buffer in enumerate(buffers):
                if not to_make.issuperset(buffer.params):
                    continue
                wanted = kinds.buffers(buffer.params[0])
                states = [self.state.get(param, {}) for param in buffer.params]
                lost = [name for name in wanted if not any(name in state for state in states)]
                if lost:
                    buffers[place] = buffer.with_new_state(lost, group)
                    self._take_state_of(buffers[place], lost)
        for group, params in zip(self.param_groups, lacking, strict=True):
            if params:
                self._make_state(group, params)
        self._counts = counts_in_use(self._counts, self.state.values())
        self._plan = None

    def _lacking_of(
        self, index: int, group: dict[str, Any], loaded: Collection[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """Parameters of a group whose state is to be made, in whole or in part, and may be."""
        kinds = Kinds.of_group(group)
        lacking: list[torch.Tensor] = []
        is_shared: bool | None = None
        for place, param in enumerate(group["params"]):
            if not (needs_state(param) or param in loaded):
                continue
            state, names = self.state.get(param, {}), kinds.names(param)
            missing = sorted(name for name in names if name not in state)
            outgrown = [name for name in names if is_outgrown(name, param, state, kinds)]
            if not missing and not outgrown:
                continue
            if is_shared is None:
                is_shared = self._shared or _is_any_shared(self.state.values())
            if is_shared:
                has = f"no {' and no '.join(missing)}" if missing else f"outgrown {outgrown[0]}"
                raise RuntimeError(
                    f"param {place} in group {index} has {has}, and other processes would not see "
                    "a new one: set shared state to 0 in place, and add parameters, unfreeze or "
                    "convert them, and turn on momentum and centered before state is shared"
                )
            lacking.append(param)
        if lacking:
            self._check_params(group["params"], loaded)
        return lacking

    @_not_compiled
    def share_memory(self) -> RMSpropAsync:
        """Moves all state to shared memory, for other processes to update too.

        The parameters themselves are shared by ``module.share_memory()``, which takes them out of
        the memory of ``flat``. CUDA tensors are shared as they are.

        Returns:
            The optimizer itself.
        """
        self._make_missing_state()
        states = [self.state.get(p, {}) for group in self.param_groups for p in group["params"]]
        move_to_shared_memory(
            own_part(state[name]) for state in states for name in STATE if name in state
        )
        self._shared = True
        return self

    def _settings_of(self, index: int) -> _Settings:
        """A group's settings, checked anew if anything has changed."""
        group = self.param_groups[index]
        keys, values = list(group), _options_of(group)
        known = self._settings.get(index)
        if known is not None and known.keys == keys and all(map(is_, known.values, values)):
            return known
        taken = self._check_settings(index)
        settings = _Settings(keys, values, taken, Kinds.of_group(group))
        # Others may change and stay the same object; but what the device reads is no matter.
        fixed = (int, float, NoneType)
        are_fixed = all(isinstance(value, fixed) or value is taken[-1] for value in values)
        if are_fixed and NOT_HONOURED.keys().isdisjoint(keys):
            self._settings[index] = settings
        return settings

    def _check_settings(self, index: int) -> tuple[Any, ...]:
        group, lr = self.param_groups[index], self.param_groups[index]["lr"]
        if group["differentiable"]:
            self._plan = None
        if group["capturable"] != self.capturable:
            raise ValueError(
                f"capturable of group {index} must stay {self.capturable}, "
                f"got {group['capturable']}"
            )
        if not self.capturable:
            return (check_group(group),)
        if not (isinstance(lr, torch.Tensor) and lr.is_floating_point() and lr.numel() == 1):
            raise TypeError(
                f"lr of group {index} must stay the tensor that capturable=True made it, to be "
                f"changed in place by fill_, got {lr!r}"
            )
        device = _device_of(group)
        if device not in (None, lr.device):
            raise ValueError(f"lr of group {index} must stay on {device}, got one on {lr.device}")
        return check_group({**group, "lr": 0.0}), lr.to(torch.float64)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @unwrapped_in_graphs
    @_not_compiled
    @_with_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        All gradients are checked before the first parameter is changed.

        Args:
            closure: Clears the gradients, computes the loss and returns it; called first.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: If a gradient is not of a dtype that can be read.
            ValueError: If a gradient is sparse otherwise than by rows, or of another shape or
                device, or a group's hyperparameter is out of range.
            IndexError: If a row is not in its parameter; on a GPU nothing of that parameter is
                changed then, and CUDA says so at a later call.
            RuntimeError: If state is missing that is shared with other processes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        found_inf = getattr(self, "found_inf", None)
        if isinstance(found_inf, torch.Tensor) and found_inf.device.type != "cpu":
            self._count_on(found_inf.device)
        settings = [self._settings_of(index) for index in range(len(groups))]
        kinds = [each.kinds for each in settings]
        if self._by_rows:
            step = self._step_beside_rows(kinds)
        else:
            step = self._plan.followed(groups, self.state, kinds) if self._plan else None
        if step is None:
            if any(group["differentiable"] for group in groups):
                self._check_differentiable()
                self._make_missing_state()
                with torch.enable_grad():
                    differentiable_step(groups, self.state, self._counts)
                return loss
            self._settings.clear()  # which were checked for other parameters, maybe
            settings = [self._settings_of(index) for index in range(len(groups))]
            step = self._first_step_by_new_plan(kinds)
        self._plan = plan = step.plan
        by_rows = self._row_steps(kinds) if self._by_rows else []
        scaling = self._scaling(groups)
        if scaling is not None and scaling.is_left_out(
            on_host=_any_on_host(plan.launches) or _any_on_host(by_rows)
        ):
            step.end()
            return loss
        plan.premises.bump_versions()
        for number, (launch, table) in enumerate(
            zip(plan.launches, step.memory.tables, strict=True)
        ):
            taken = settings[launch.group].taken
            if scaling is None and not taken[0].stochastic_rounding:
                launch.backend.update_(table, *taken)
            else:
                self._launch_with(scaling, launch, number, table, taken)
        step.end()
        for number, of_rows in enumerate(by_rows, len(plan.launches)):
            taken = settings[of_rows.group].taken
            self._launch_with(scaling, of_rows, number, of_rows.update, taken)
        counters = plan.counters
        if by_rows:
            torch.autograd.graph.increment_version([each.param for each in by_rows])
            counters = counters + counters_of((each.step for each in by_rows), self._counts)
        for counter in counters:
            counter.add_one(None if scaling is None else scaling.found_inf)
        return loss

    def _check_differentiable(self) -> None:
        """Checks that a step through torch's operations is asked for nothing that it has not."""
        asked = [
            name
            for name in ("max_grad_norm", "grad_scale", "found_inf")
            if getattr(self, name, None) is not None
        ]
        asked += ["flat"] * self.flat
        asked += [
            name
            for name in ("stochastic_rounding", "kahan_sum")
            if any(group[name] for group in self.param_groups)
        ]
        if asked:
            raise ValueError(
                f"{asked[0]} must be off where a group is differentiable: its step goes through "
                "torch's operations one parameter at a time"
            )

    def _first_step_by_new_plan(self, kinds: list[Kinds]) -> PlannedStep:
        # After a backward it may be what was frozen since ``zero_grad`` that is zero.
        if self.flat and _graph_position() != self._graph:
            for buffer in (each for buffers in self._flat_buffers for each in buffers):
                buffer.drop_grads_of_frozen()
        self._make_missing_state()
        groups, buffers = self.param_groups, self._flat_buffers
        for group in groups:
            # What was left is of older values from now on, and steps pass by what is not noted.
            for option, name in (("kahan_sum", "kahan_comp"), ("lazy_decay", "last_update")):
                for param in () if group[option] else group["params"]:
                    self.state.get(param, {}).pop(name, None)
        self._by_rows = params_by_rows(groups)
        return make_plan(
            groups, self.state, kinds, self._counts, buffers, self.backend, self._by_rows
        )

    def _step_beside_rows(self, kinds: list[Kinds]) -> PlannedStep | None:
        """A step of all that is not updated by rows, by the plan that there is, if it may be."""
        groups = self.param_groups
        if self._plan is None or not are_by_rows(groups, self._by_rows):
            return None
        return self._plan.followed(without(groups, self._by_rows), self.state, kinds)

    def _row_steps(self, kinds: list[Kinds]) -> list[RowStep]:
        self._make_missing_state()
        groups, counts = self.param_groups, self._counts
        return row_steps(groups, self.state, kinds, counts, self._by_rows, self.backend)

    def _launch_with(
        self,
        scaling: Scaling | None,
        launch: PlannedLaunch | RowStep,
        number: int,
        what: LaunchTable | RowUpdate,
        taken: tuple[Any, ...],
    ) -> None:
        """Launches an update that may be scaled, or rounded stochastically."""
        more: dict[str, Any] = {}
        hyperparameters, *lr_on_device = taken
        if lr_on_device:
            more["lr_on_device"] = lr_on_device[0]
        if hyperparameters.stochastic_rounding:
            # Of all parameters together: greater after each step, whichever it reaches.
            steps = int(sum(float(counts.double().sum()) for counts in self._counts))
            more["key"] = key_of_step(self.param_groups[launch.group]["seed"], steps, number)
        if scaling is not None and launch.backend.name == "triton":
            more |= scaling.on(what.device)
        elif scaling is not None:
            hyperparameters = hyperparameters.with_grad_factor(float(scaling.factor))
        is_unchecked = isinstance(what, RowUpdate) and what.device.type != "cpu"
        if is_unchecked:
            more["verdict"] = torch.zeros(1, dtype=torch.int32, device=what.device)
        launch.backend.update_(what, hyperparameters, **more)
        if is_unchecked:  # without a wait: as torch's embedding says that an index is not in it
            torch._assert_async(more["verdict"] == 0, "a gradient has a row that is not there")

    def _scaling(self, groups: list[dict[str, Any]]) -> Scaling | None:
        """What gradients are multiplied by; None if by nothing."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(found_inf, torch.Tensor):  # but a number: there are no gradients
            found_inf = None
        if self.max_grad_norm is None and grad_scale is None and found_inf is None:
            return None
        check_max_grad_norm(self.max_grad_norm)
        params = (param for group in groups for param in group["params"])
        grads = [_dense(grad) for param in params if (grad := param.grad) is not None]
        return scaling_of(grads, self.max_grad_norm, grad_scale, found_inf)

    @_not_compiled
    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clears all gradients.

        Args:
            set_to_none: To None instead of zero, which saves memory. By default True, and False if
                ``flat``, where it also brings gradients back that had left the flat memory.
        """
        if set_to_none is not None or not self.flat:
            super().zero_grad(set_to_none is not False)
        elif _is_profiled() or profiler._is_profiler_enabled:
            with profiler.record_function(self._zero_grad_profile_name):
                self._zero_flat_grads()
        else:
            self._zero_flat_grads()

    def _zero_flat_grads(self) -> None:
        flat = [buffer for buffers in self._flat_buffers for buffer in buffers]
        params = {id(param): param for group in self.param_groups for param in group["params"]}
        for buffer in flat:
            if buffer.attach_grads(params.keys()):
                self._plan = None  # which reaches them one by one
        for inside in (param for buffer in flat for param in buffer.params):
            params.pop(id(inside), None)
        for param in params.values():
            param.grad = None
        self._graph = _graph_position()

    @_not_compiled
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads hyperparameters and state, in place: tensors that are shared stay shared.

        State goes on as it began, with the options that it was made with, whatever this optimizer
        was made with; but ``capturable`` and ``backend`` stay, as they are no part of it. All keep
        their dtypes: what is loaded is cast.

        What other libraries made does not say all of that: ``import_state`` does for them. A state
        of ``torch.optim.RMSprop`` is taken as it is where its meaning is this optimizer's own:
        ``eps_inside_sqrt``, ``decoupled_weight_decay``, ``lr_in_momentum`` and
        ``initial_accumulator_value`` are all false, as an ``RMSprop``'s are. (One that pfrl made
        cannot always be told from torch's, and must be imported.) If it has nothing but options
        yet, those of this optimizer stay, with a warning.

        Args:
            state_dict: From ``state_dict()`` or ``import_state``.

        Raises:
            TypeError: If a hyperparameter or value is of a wrong type.
            ValueError: If groups, parameters, names of state or shapes differ, a hyperparameter is
                out of range, or an option is not said. Nothing is loaded then.
            RuntimeError: If state is missing that is shared with other processes. The same.
        """
        groups = self.param_groups
        state: dict[torch.Tensor, Any] = {}
        final: dict[str, Any] = {}
        with_state: set[torch.Tensor] = set()

        def check(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            loaded = readable(self, loaded)
            check_loadable(self, loaded)
            with_state.update(param for _, param, saved in pair(self, loaded) if saved)
            self._make_missing_state(with_state)
            for index, (group, saved) in enumerate(
                zip(groups, loaded["param_groups"], strict=True)
            ):
                of_saved = {**group, **saved, "params": group["params"]}
                self._lacking_of(index, of_saved, with_state)
            state.update(self.state)
            final.update(loaded)
            return loaded

        def restore(_: Optimizer) -> None:
            # torch has cast state to the parameters' dtype, and made new tensors.
            for group, old in zip(self.param_groups, groups, strict=True):
                for name in self.defaults:
                    group.setdefault(name, old[name])
                group["capturable"] = self.capturable
                if self.capturable:  # captured graphs read it where it is
                    group["lr"] = old["lr"].fill_(group["lr"])
            for counts in self._counts:
                counts[1].zero_()
            for param, loaded in self.state.items():
                if param in state:  # what a user has put there goes with it
                    others = loaded.keys() - STATE
                    state[param].update({name: loaded[name] for name in others})
            self.state.update(state)
            self._make_missing_state(with_state)  # of kinds that these hyperparameters ask for
            for group, param, saved in pair(self, final):
                own = self.state.get(param, {})  # of a frozen parameter not all, or nothing
                wanted = Kinds.of_group(group).names(param)
                for name in [each for each in STATE if each in own]:
                    if name in saved:
                        own[name].copy_(as_saved(saved[name]))
                        continue
                    as_real(own[name]).fill_(first_value(name, group))
                    if name not in wanted:
                        del own[name]

        # After the user's hooks that may change the dict, and before those that may change state.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    @_not_compiled
    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: torch's state of an optimizer, and how it was made."""
        own = {name: getattr(self, name) for name in _OWN}
        return {**super().__getstate__(), **own, "flat": False}

    @_not_compiled
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what was pickled, or what torch loads."""
        super().__setstate__(state)
        self._plan, self._by_rows, self._settings = None, {}, {}
        if "_counts" in state:  # it was copied or pickled
            self._counts = gather_steps(self._counts, self.state.values())
            self._shared = _is_any_shared(self.state.values())
        if len(self.__dict__.setdefault("_flat_buffers", [])) != len(self.param_groups):
            self._flat_buffers = [[] for _ in self.param_groups]


def _is_any_shared(states: Iterable[dict[str, Any]]) -> bool:
    """Whether some state on the CPU lies where other processes may know it."""
    buffers = (state[name] for state in states for name in BUFFERS if name in state)
    return any(buffer.device.type == "cpu" and own_part(buffer).is_shared() for buffer in buffers)


def _any_on_host(launches: Sequence[PlannedLaunch] | Sequence[RowStep]) -> bool:
    """Whether some are computed on the host."""
    return any(launch.backend.name != "triton" for launch in launches)


def _dense(grad: torch.Tensor) -> torch.Tensor:
    """What a gradient's norm is of: of a sparse one, the sums of those of the same row."""
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def _device_of(group: dict[str, Any]) -> torch.device | None:
    """Where a group is updated; None if nothing in it is."""
    return next((param.device for param in group["params"] if needs_state(param)), None)


def _lr_on(device: torch.device | str, lr: float | torch.Tensor) -> torch.Tensor:
    """A learning rate where kernels read it: the same tensor, if it is one that is there."""
    if isinstance(lr, torch.Tensor) and lr.device == torch.device(device):
        return lr
    return torch.full((), float(lr), dtype=torch.float64, device=device)
