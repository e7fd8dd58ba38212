"""RMSprop for asynchronous training, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, overload

import torch
from torch.optim import Optimizer

from hogstream.kernels.backends.select import check_backend, select_backend
from hogstream.kernels.hyperparameters import HYPERPARAMETERS, Hyperparameters
from hogstream.kernels.operands import COMPUTE_DTYPES, check_param
from hogstream.optim.flat_buffers import FlatBuffer, check_params_disjoint, make_flat_buffers
from hogstream.optim.step_plan import Reached, StepPlan, make_plan


class RMSpropAsync(Optimizer):
    """RMSprop with epsilon inside the root, and state that may be shared between workers.

    Per parameter, with ``ms`` (``state["square_avg"]``) starting at zero::

        ms    = alpha*ms + ((1 - alpha)*grad)*grad
        param = param - (lr*grad) / sqrt(ms + eps)

    as in ChainerRL's ``RMSpropAsync``: the non-centered "shared RMSProp" of Mnih et al. 2016
    (arXiv 1602.01783). Every backend gives the same bits.

    State is made here, not at the first step, so that it can be shared before workers start. Its
    names are those of ``torch.optim.RMSprop``: ``step`` (float32 scalar) and ``square_avg`` (shape
    of the parameter; float64 for float64 parameters, else float32). A parameter whose gradient is
    None is left alone, its state too.

    Args:
        params: Parameters, named parameters or groups; float16, bfloat16, float32 or float64.
        lr: Learning rate, finite and >= 0.
        alpha: Decay of ``ms``, in [0, 1).
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
        eps_inside_sqrt: If false, divide by ``sqrt(ms) + eps``, as ``torch.optim.RMSprop``.
        decoupled_weight_decay: Shrink the parameter by ``1 - lr*weight_decay`` instead of adding
            ``weight_decay*param`` to the gradient.
        maximize: Ascend the gradient.
        flat: Move the parameters of a group that require gradients, and gradients for all of them,
            into one piece of memory each: a step is then one launch without a table. Gradients
            stay where they are: ``zero_grad()`` sets them to zero and not to None, so a parameter
            that a loss does not reach is updated with zero. A gradient that leaves the flat memory
            (``param.grad = ...``, ``model.zero_grad()``) is read all the same, through the table,
            until the next ``zero_grad()``; so is a parameter whose ``data`` is replaced, from then
            on. A copied or unpickled optimizer is not flat.
        capturable: Keep ``lr`` and ``step`` on the device, so that ``step()`` may be captured in a
            CUDA graph. ``group["lr"]`` is then a float64 tensor of shape (), which torch's
            schedulers, or ``fill_``, change in place, replays included; the host can't check it.
            What else a group holds is captured as it is. Needs Triton, one device a group, and a
            step before the first capture, which compiles.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.

    Raises:
        TypeError: If a parameter or number is of a wrong type or dtype.
        ValueError: If a parameter cannot be updated in place, a number is out of range,
            ``backend`` is unknown or cannot take a parameter's device, or ``capturable`` cannot be
            honoured for a group.
        RuntimeError: If ``backend`` is not available here.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        eps_inside_sqrt: bool = True,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        flat: bool = False,
        capturable: bool = False,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        for name, switch in (("flat", flat), ("capturable", capturable)):
            if not isinstance(switch, bool):
                raise TypeError(f"{name} must be True or False, got {switch!r}")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "eps_inside_sqrt": eps_inside_sqrt,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        Hyperparameters.from_group(defaults)
        self.backend, self.flat, self.capturable = backend, False, capturable
        self._plan: StepPlan | None = None
        self._flat_buffers: list[list[FlatBuffer]] = []  # of each group
        # By group: its hyperparameters, and what a launch takes for them.
        self._settings: dict[int, tuple[list[Any], tuple[Any, ...]]] = {}
        super().__init__(params, defaults)
        self.flat = flat
        if flat:  # only now, when no group can be refused any more
            check_params_disjoint(self.param_groups)
            for index in range(len(self.param_groups)):
                self._make_flat(index)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, and makes their state.

        Args:
            param_group: ``{"params": ...}``, and any hyperparameter that differs from the defaults.

        Raises:
            TypeError: As for the class.
            ValueError: As for the class, or if a parameter is in another group already.
            RuntimeError: If no backend is available for a parameter's device.
        """
        Hyperparameters.from_group({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, torch.Tensor):
            params = [params]
        elif not isinstance(params, set):  # which torch refuses, as it has no order
            params = list(params)  # an iterator may be read only once
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        # torch refuses anything that is not a tensor, in its own words.
        tensors = [each for each in tensors if isinstance(each, torch.Tensor)]
        self._check_params(tensors)
        if self.flat:
            check_params_disjoint([*self.param_groups, {"params": tensors}])
        super().add_param_group({**param_group, "params": params})
        self._make_state(self.param_groups[-1])
        if self.flat:
            self._make_flat(len(self.param_groups) - 1)

    def _check_params(self, params: list[torch.Tensor]) -> None:
        for index, param in enumerate(params):
            check_param(param, f"param {index}")
            backend = select_backend(self.backend, param.device.type).name
            if self.capturable and backend != "triton":
                raise ValueError(
                    f"capturable=True needs the Triton backend, got {backend} for param {index} "
                    f"on {param.device}"
                )
            if self.capturable and param.device != params[0].device:
                raise ValueError(
                    f"capturable=True needs one device a group, got {params[0].device} and "
                    f"{param.device} for param {index}"
                )

    def _make_state(self, group: dict[str, Any]) -> None:
        params = group["params"]
        device = params[0].device if self.capturable and params else torch.device("cpu")
        steps = torch.zeros(len(params), dtype=torch.float32, device=device)
        if self.capturable:
            lr = float(group["lr"])
            group["lr"] = torch.full((), lr, dtype=torch.float64, device=device)
        for param, step in zip(params, steps, strict=True):
            self.state[param] = {"step": step, "square_avg": _new_ms(param)}
        self._flat_buffers.append([])
        self._plan = None

    def _make_flat(self, index: int) -> None:
        trained = [param for param in self.param_groups[index]["params"] if param.requires_grad]
        self._flat_buffers[index] = make_flat_buffers(trained)
        for buffer in self._flat_buffers[index]:
            for param, ms in zip(buffer.params, buffer.mss, strict=True):
                self.state[param]["square_avg"] = ms

    def share_memory(self) -> RMSpropAsync:
        """Moves all state to shared memory, for other processes to update too.

        The parameters themselves are shared by ``module.share_memory()``. CUDA tensors are shared
        as they are.

        Returns:
            The optimizer itself.
        """
        for state in self.state.values():
            for tensor in state.values():
                tensor.share_memory_()
        return self

    def _settings_of(self, index: int) -> tuple[Any, ...]:
        """What a launch for a group takes after its table, checked anew if anything changed."""
        values = [self.param_groups[index][name] for name in HYPERPARAMETERS]
        known, settings = self._settings.get(index, ([], ()))
        if len(known) == len(values) and all(map(is_, known, values)):
            return settings
        settings = self._check_settings(index)
        on_host = values[HYPERPARAMETERS.index("lr") + 1 :] if self.capturable else values
        if all(isinstance(value, (int, float)) for value in on_host):
            self._settings[index] = values, settings  # others may change and stay the same object
        return settings

    def _check_settings(self, index: int) -> tuple[Any, ...]:
        group = self.param_groups[index]
        if not self.capturable:
            return (Hyperparameters.from_group(group),)
        lr = group["lr"]
        if not (isinstance(lr, torch.Tensor) and lr.dtype == torch.float64 and lr.ndim == 0):
            raise TypeError(
                f"lr of group {index} must stay the float64 tensor that capturable=True made it, "
                f"to be changed in place by fill_, got {lr!r}"
            )
        device = group["params"][0].device if group["params"] else lr.device
        if lr.device != device:
            raise ValueError(f"lr of group {index} must stay on {device}, got one on {lr.device}")
        return Hyperparameters.from_group({**group, "lr": 0.0}), lr

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        All gradients are checked before the first parameter is changed.

        Args:
            closure: Clears the gradients, computes the loss and returns it; called first.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: If a gradient has another dtype than its parameter.
            ValueError: If a gradient is sparse, or of another shape or device, or a group's
                hyperparameter is out of range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        settings = [self._settings_of(index) for index in range(len(groups))]
        reached = Reached.of(groups)
        plan = self._plan.followed(groups, self.state, reached) if self._plan else None
        copies: list[torch.Tensor] = []  # which must live until they are launched
        if plan is None:
            plan, copies = make_plan(groups, self.state, self._flat_buffers, reached, self.backend)
        self._plan = plan
        for launch in plan.launches:
            launch.backend.update_(launch.table, *settings[launch.group])
        for counter in plan.counters:
            counter.add_(1)
        del copies
        torch.autograd.graph.increment_version(reached.params)  # so that autograd notices
        return loss

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clears all gradients.

        Args:
            set_to_none: To None instead of zero, which saves memory. By default True, and False if
                ``flat``, where it also brings gradients back that had left the flat memory.
        """
        if set_to_none is None and self.flat:
            flat = [buffer for buffers in self._flat_buffers for buffer in buffers]
            for buffer in flat:
                if buffer.attach_grads():
                    self._plan = None  # which reaches them one by one
            inside = {id(param) for buffer in flat for param in buffer.params}
            for group in self.param_groups:
                for param in group["params"]:
                    if id(param) not in inside:
                        param.grad = None
            return
        super().zero_grad(set_to_none is not False)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads hyperparameters and state, in place: tensors that are shared stay shared.

        A ``torch.optim.RMSprop`` state is taken too, if it is neither centered nor has momentum;
        hyperparameters that it does not know stay as they are. So does ``backend``, which is not
        part of the state.

        Args:
            state_dict: From ``state_dict()``.

        Raises:
            TypeError: If a hyperparameter is of a wrong type.
            ValueError: If groups, parameters, names of state or shapes differ, a hyperparameter is
                out of range, or the state has momentum or is centered. Nothing is loaded then.
        """
        state, groups = dict(self.state), self.param_groups
        final: dict[str, Any] = {}

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            _check_loadable(self, loaded)
            final.update(loaded)

        def restore(_: Optimizer) -> None:
            # torch has cast square_avg to the parameters' dtype, and made new tensors.
            for group, old in zip(self.param_groups, groups, strict=True):
                for name in HYPERPARAMETERS:
                    group.setdefault(name, old[name])
                if self.capturable:  # captured graphs read it where it is
                    group["lr"] = old["lr"].fill_(group["lr"])
            for param, saved in _pair(self, final):
                for name, tensor in state[param].items():
                    if saved:
                        tensor.copy_(torch.as_tensor(saved[name]))
                    else:
                        tensor.zero_()
                self.state[param] = state[param]

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

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: torch's state of an optimizer, and how it was made."""
        own = {name: getattr(self, name) for name in ("backend", "capturable")}
        return {**super().__getstate__(), **own, "flat": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what was pickled, or what torch loads."""
        super().__setstate__(state)
        self._plan, self._settings = None, {}
        if len(self.__dict__.setdefault("_flat_buffers", [])) != len(self.param_groups):
            self._flat_buffers = [[] for _ in self.param_groups]


def _new_ms(param: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(
        param,
        dtype=COMPUTE_DTYPES[param.dtype],
        memory_format=torch.preserve_format,
        requires_grad=False,
    )


def _pair(
    optimizer: Optimizer, state_dict: dict[str, Any]
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter with its saved state, which is empty if none was saved."""
    return [
        (param, state_dict["state"].get(saved_id, {}))
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        for param, saved_id in zip(group["params"], saved["params"], strict=True)
    ]


def _check_loadable(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if saved_sizes != sizes:
        raise ValueError(f"state_dict must have groups of {sizes} parameters, got {saved_sizes}")
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for name in ("momentum", "centered"):
            if saved.get(name):
                raise ValueError(
                    f"{name} of group {index} must be off to be loaded, got {saved[name]}"
                )
        Hyperparameters.from_group({**group, **saved})
    for index, (param, saved) in enumerate(_pair(optimizer, state_dict)):
        if saved and saved.keys() != {"step", "square_avg"}:
            raise ValueError(
                f"state of parameter {index} must have step and square_avg, got {sorted(saved)}"
            )
        for name, shape in (("step", ()), ("square_avg", tuple(param.shape))):
            got = tuple(torch.as_tensor(saved[name]).shape) if saved else shape
            if got != shape:
                raise ValueError(f"{name} of parameter {index} must have shape {shape}, got {got}")
