"""The settings check themselves, and the schedulers take them as they are."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler import (
    ProcessScheduler,
    SchedulerSettings,
    SettingError,
    StreamScheduler,
)
from scheduler_testing import small


@pytest.mark.parametrize(
    ("values", "name", "reason"),
    [
        ({"workers": 0}, "workers", "must be an integer >= 1, got 0"),
        ({"depth": 0}, "depth", "must be an integer >= 1, got 0"),
        ({"policy": "bounded:x"}, "policy", "bounded:K with an integer K >= 0, got 'bounded:x'"),
        ({"backend": "fortran"}, "backend", "numba, numpy, got 'fortran'"),
        ({"read": "copy"}, "read", "must be one of live, snapshot, got 'copy'"),
        ({"deadline": 0.0}, "deadline", "must be a finite number > 0, got 0.0"),
        ({"batch": 2}, "batch", "must be an integer <= 1, as many updates as may be in flight"),
        ({"batch": 2, "depth": 2, "policy": "awaited"}, "batch", "must be 1 with policy 'awaited'"),
    ],
)
def test_error_says_which_setting_it_is(values: dict[str, Any], name: str, reason: str) -> None:
    with pytest.raises(SettingError) as caught:
        SchedulerSettings(**{"workers": 1, **values})
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.name == name
        assert reason in error.reason
        assert str(error) == f"{name} {error.reason}"
        assert isinstance(error, ValueError)


@pytest.mark.parametrize("name", [each.name for each in fields(SchedulerSettings)])
def test_no_setting_takes_just_anything(name: str) -> None:
    values: dict[str, Any] = {"workers": 1, name: object()}
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be "):
        SchedulerSettings(**values)


def test_settings_stay_as_they_were_checked() -> None:
    settings = SchedulerSettings(workers=np.int64(2), policy="bounded:007")  # type: ignore[arg-type]
    assert (type(settings.workers), settings.policy) == (int, "bounded:7")
    with pytest.raises(FrozenInstanceError):
        settings.depth = 0  # type: ignore[misc]
    with pytest.raises(SettingError):
        replace(settings, depth=0)


def test_scheduler_takes_settings_or_values_or_some_values_in_their_place() -> None:
    settings = SchedulerSettings(
        workers=4, depth=8, backend="numpy", hyperparameters=Hyperparameters(lr=0.1, eps=0.5)
    )
    by_value = StreamScheduler(small(), workers=4, depth=8, backend="numpy", lr=0.1, eps=0.5)
    assert by_value.settings == settings
    assert StreamScheduler(small(), settings).settings == settings
    other = StreamScheduler(small(), settings, policy="locked", lr=0.2)
    assert other.settings == replace(
        settings, policy="locked", hyperparameters=Hyperparameters(lr=0.2, eps=0.5)
    )
    assert other.hyperparameters is other.settings.hyperparameters
    assert ProcessScheduler(small(), settings, processes=2).settings == settings
    assert ProcessScheduler(small(), processes=2).settings == SchedulerSettings(workers=1)


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="settings must be SchedulerSettings, got dict"):
        StreamScheduler(small(), {"workers": 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="workers"):
        StreamScheduler(small(), depth=2)


def test_unknown_setting_is_told_what_a_scheduler_takes_and_no_more() -> None:
    with pytest.raises(TypeError, match="hyperparameters must be among lr, ") as error:
        StreamScheduler(small(), workers=1, nesterov=True)
    named = str(error.value).split("among ")[1].split(", got")[0].split(", ")
    for name in named:
        default = getattr(Hyperparameters(), name)
        other: Any = not default if isinstance(default, bool) else 0.5
        StreamScheduler(small(), workers=1, **{name: other})
    refused = {"stochastic_rounding", "kahan_sum"}
    assert {each.name for each in fields(Hyperparameters)} == {*named} | refused


@pytest.mark.parametrize(
    ("policy", "batch"),
    [("lock-free", 4), ("locked", 4), ("ordered", 4), ("awaited", 1), ("bounded:2", 1)],
)
def test_policy_that_waits_for_each_update_is_compared_without_batches(
    policy: str, batch: int
) -> None:
    settings = SchedulerSettings(workers=2, depth=4, batch=4, read="snapshot")
    assert settings.with_policy(policy) == replace(settings, policy=policy, batch=batch)
