"""What parameter groups hold besides options: what is nobody's business, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from hogstream.optim import RMSprop, RMSpropAsync
from hogstream.optim.options import OPTIONS
from optim_testing import parameters, step_along

# What people write into groups for themselves, and what torch or schedulers put there.
OWN_KEYS: dict[Any, Any] = {
    "name": "head",
    "group_name": "decay",
    "layer": 3,
    "layer_id": 3,
    "lr_scale": 0.5,
    "lr_mult": 2.0,
    "decay_mult": 0.0,
    "wd_mult": 0.0,
    "no_weight_decay": True,
    "use_weight_decay": False,
    "min_lr": 1e-5,
    "max_lr": 0.1,
    "base_lr": 0.1,
    "initial_lr": 0.1,
    "swa_lr": 0.05,
    "max_momentum": 0.95,
    "base_momentum": 0.85,
    "fused": None,
    "tag": object(),
    7: "a key that is no name",
}
REFUSED: dict[tuple[str, Any], str] = {
    ("momentun", 0.9): "momentun is no option of a parameter group, got 0.9: write momentum",
    ("momentum_", 0.9): "write momentum",
    ("Momentum", 0.9): "write momentum",
    ("centred", True): "write centered",
    ("weight_deacy", 0.1): "write weight_decay",
    ("weightdecay", 0): "write weight_decay",
    ("weight_decays", 0.1): "write weight_decay",
    ("LR", 0.1): "write lr",
    ("aplha", 0.9): "write alpha",
    ("maximise", True): "write maximize",
    ("rho", 0.9): "write alpha",
    ("epsilon", 1e-3): "write eps",
    ("eps_in_sqrt", False): "write eps_inside_sqrt",
    ("decoupled_decay", True): "write decoupled_weight_decay",
    ("nesterov", True): "nesterov must be left out of a parameter group, got True: RMSprop has no",
    ("betas", (0.9, 0.999)): "betas must be left out of a parameter group, got (0.9, 0.999): ",
    ("clipnorm", 1.0): "clip gradients before the step",
    ("flat", True): "it is of the whole optimizer",
    ("backend", "numpy"): "it is of the whole optimizer",
}


@pytest.mark.parametrize("kind", [RMSprop, RMSpropAsync])
def test_keys_of_others_are_kept_and_change_nothing(kind):
    plain, marked = parameters((3,)), parameters((3,))
    optimizers = [kind(plain), kind([{"params": marked, **OWN_KEYS}])]
    for optimizer in optimizers:
        step_along(optimizer, first_seed=0, steps=3)
    assert torch.equal(plain[0], marked[0])
    assert OWN_KEYS.items() <= optimizers[1].param_groups[0].items()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert OWN_KEYS.keys() <= optimizers[1].param_groups[0].keys()


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_an_option_that_would_be_ignored_is_refused_wherever_it_is_given(key, value):
    message = re.escape(REFUSED[key, value])
    param, other = parameters((3,), (3,))
    with pytest.raises(ValueError, match=message):
        RMSpropAsync([{"params": [param], key: value}])
    optimizer = RMSpropAsync([param])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], key: value})
    assert len(optimizer.param_groups) == 1
    step_along(optimizer, first_seed=0, steps=3)  # by a plan that is followed
    before = param.tolist()
    optimizer.param_groups[0][key] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer.param_groups[0][key]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert param.tolist() == before
    optimizer.step()
    optimizer.defaults[key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other]})


def test_an_option_of_a_relative_may_ask_for_nothing():
    (param,) = parameters((3,))
    optimizer = RMSpropAsync([{"params": [param], "nesterov": False, "clipnorm": None}])
    step_along(optimizer, first_seed=0, steps=3)
    optimizer.param_groups[0]["nesterov"] = True
    with pytest.raises(ValueError, match="nesterov must be left out"):
        optimizer.step()


def test_every_option_is_known_by_name():
    assert RMSpropAsync(parameters((3,))).defaults.keys() == set(OPTIONS)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "averaging": lambda o: SWALR(o, 0.05, anneal_epochs=2),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_what_schedulers_put_there_is_theirs(make):
    groups = []
    for kind in (RMSprop, torch.optim.RMSprop):
        params = parameters((3,))
        optimizer = kind(params, momentum=0.9)
        scheduler = make(optimizer)
        for step in range(6):
            step_along(optimizer, first_seed=step)
            scheduler.step()
        groups.append(optimizer.param_groups[0])
    torch.testing.assert_close(groups[0].pop("params"), groups[1].pop("params"))
    assert {key: groups[0][key] for key in groups[1]} == groups[1]
