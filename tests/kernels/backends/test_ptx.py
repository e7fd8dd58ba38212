"""The kernels' PTX, executed without a GPU: bits, far offsets, races, and faults that are found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import pytest

pytest.importorskip("triton")

import kernel_mutations
from kernel_mutations import MUTATIONS, copy_kernels_with
from ptx_checks import check_form
from ptx_compiling import DTYPES, FORMS, TARGETS, Compiled, Form, compile_forms
from ptx_far import check_far_offsets
from ptx_races import check_race

pytestmark = pytest.mark.slow

# Some of all forms, others for each device: every switch with every dtype. ``make prove`` has all.
_SOME = {target: FORMS[43 * index :: 145] for index, target in enumerate(TARGETS)}
_VERDICTS = [
    (target, Form(kernel, dtype))
    for target, kernel, dtype in zip(
        (*TARGETS, 90),
        ("finite_kernel", "multi_tensor_finite_kernel") * 2,
        DTYPES,
        strict=True,
    )
]
_MIXED = [
    (80, Form("rmsprop_kernel", "bfloat16", stochastic=True, scaled=True, grad_dtype="float32")),
    (90, Form("multi_tensor_rmsprop_kernel", "float16", stochastic=True, grad_dtype="bfloat16")),
    (100, Form("multi_tensor_rmsprop_kernel", "bfloat16", momentum=True, compensated=True)),
    (90, Form("rmsprop_kernel", "float16", compensated=True, scaled=True, grad_dtype="float64")),
    (80, Form("rmsprop_kernel", "float32", checked=True, scaled=True, grad_dtype="float16")),
    (100, Form("rmsprop_kernel", "float64", centered=True, grad_dtype="bfloat16")),
]
CHECKED = list(
    dict.fromkeys(
        [*((target, form) for target in TARGETS for form in _SOME[target]), *_VERDICTS, *_MIXED]
    )
)
_FULL: dict[str, Any] = {"centered": True, "momentum": True}
_STATES: list[dict[str, Any]] = [{}, {"centered": True}, {"momentum": True}, _FULL]
FAR = [
    *product((90,), [Form("rmsprop_kernel", dtype, **_FULL) for dtype in DTYPES]),
    (100, Form("multi_tensor_rmsprop_kernel", "float32", **_FULL)),
    (80, Form("finite_kernel", "float16")),
]
RACING = [
    (target, Form("rmsprop_kernel", dtype, counted=True, **state))
    for target, dtype, state in zip((*TARGETS, 90), DTYPES, _STATES, strict=True)
]


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[int, Form], Compiled]]:
    """All that is tested here, compiled at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield compile_forms(dict.fromkeys([*CHECKED, *FAR, *RACING]))


def named(task: tuple[int, Form]) -> str:
    target, form = task
    return f"sm_{target} {form.name}"


def test_every_switch_of_every_dtype_is_among_them():
    def switches(forms: Iterable[Form]) -> set[tuple[str, str, bool]]:
        return {
            (form.dtype, name, value)
            for form in forms
            if form.updates
            for name, value in form._asdict().items()
            if isinstance(value, bool)
        }

    assert switches(form for _, form in CHECKED if form in FORMS) == switches(FORMS)


@pytest.mark.parametrize("task", CHECKED, ids=named)
def test_it_gives_the_bits_of_numpy(compiled, task):
    assert check_form(compiled[task]) > 50


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("task", FAR, ids=named)
def test_offsets_may_need_33_bits(compiled, task, aligned):
    assert check_far_offsets(compiled[task], aligned) > 1000


@pytest.mark.parametrize("task", RACING, ids=named)
def test_race_counters_tell_the_truth(compiled, task):
    assert sum(check_race(compiled[task], seed) for seed in range(4)) > 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_made_on_purpose_can_be_made(name, tmp_path):
    copy_kernels_with(MUTATIONS[name], tmp_path)


@pytest.mark.parametrize("name", ["operations may be fused", "what landed is read late"])
def test_a_fault_made_on_purpose_is_found(name):
    assert kernel_mutations.run(name).by is not None
