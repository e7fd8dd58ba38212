"""The PTX of the kernel of rows, executed without a GPU, and how wide its accesses are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

pytest.importorskip("triton")

import kernel_mutations
from ptx_compiling import ACCESS_FORMS, Compiled, Form, compile_forms
from ptx_far import check_far_offsets
from ptx_races import check_locks, check_race
from ptx_row_access import check_any

pytestmark = pytest.mark.slow

Rows = partial(Form, "row_rmsprop_kernel")

# Some of all forms: every switch. ``make prove`` has all.
CHECKED = [
    (80, Rows("float32", columns=128, unit=4)),
    (90, Rows("float32", rowwise=True, lazy=True, counted=True, columns=32, unit=4)),
    (100, Rows("float32", eps_inside_sqrt=True, coupled=True, momentum=True, columns=2, unit=1)),
    (80, Rows("bfloat16", rowwise=True, compensated=True, grad_dtype="float32", columns=8, unit=8)),
    (90, Rows("float16", stochastic=True, checked=True, scaled=True, columns=128, unit=1)),
    (100, Rows("float64", rowwise=True, momentum=True, lr_in_momentum=True, columns=32, unit=2)),
    (90, Rows("float64", centered=True, lazy=True, columns=32, unit=1)),
    (80, Rows("float32", lr_on_device=True, lazy=True, grad_dtype="float64", columns=4, unit=4)),
    (90, Rows("bfloat16", momentum=True, checked=True, columns=32, unit=8, locked=True)),
    # What else lanes ask of rows.
    *((target, form) for target, form in zip((80, 90, 100) * 9, ACCESS_FORMS[::3], strict=False)),
]
FAR = [CHECKED[6], (80, Rows("float32", rowwise=True, columns=32, unit=1))]
RACING = [CHECKED[1], (80, Rows("bfloat16", counted=True, columns=8, unit=8))]
LOCKED = [
    (80, Rows("float32", columns=32, unit=4, locked=True)),
    (90, Rows("float32", counted=True, columns=128, unit=4, locked=True)),
    (100, Rows("float64", counted=True, centered=True, columns=32, unit=1, locked=True)),
]
#: And how a thread reads and writes its elements of the table, and of its state.
WIDE = [
    *(
        (target, Rows("float32", columns=columns, unit=4), "v4.b32", "v4.b32")
        for target in (80, 100)
        for columns in (32, 128)
    ),
    (90, Rows("float64", columns=32, unit=2), "v2.b64", "v2.b64"),
    (90, Rows("bfloat16", grad_dtype="float32", columns=64, unit=8), "v2.b32", "v4.b32"),
]


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[int, Form], Compiled]]:
    """All that is tested here, compiled at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        wide = [task[:2] for task in WIDE]
        yield compile_forms(dict.fromkeys([*CHECKED, *FAR, *RACING, *LOCKED, *wide]))


def named(task: tuple[int, Form]) -> str:
    target, form = task
    return f"sm_{target} {form.name}"


def test_every_switch_is_among_them():
    switches = [name for name, default in Form._field_defaults.items() if default is False]
    assert all({getattr(form, each) for _, form in CHECKED} == {False, True} for each in switches)


@pytest.mark.parametrize("task", CHECKED, ids=named)
def test_it_gives_the_bits_of_numpy(compiled, task):
    assert check_any(compiled[task]) > 5


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("task", FAR, ids=named)
def test_offsets_may_need_33_bits(compiled, task, aligned):
    assert check_far_offsets(compiled[task], aligned) > 100


@pytest.mark.parametrize("task", RACING, ids=named)
def test_race_counters_tell_the_truth(compiled, task):
    assert sum(check_race(compiled[task], seed) for seed in range(4)) > 0


@pytest.mark.parametrize("task", LOCKED, ids=named)
def test_no_update_is_lost_under_the_lock_of_a_row(compiled, task):
    for seed in range(6):
        if task[1].counted:
            assert check_race(compiled[task], seed) == 0
        else:
            check_locks(compiled[task], seed)


@pytest.mark.parametrize(
    ("target", "form", "stored", "state"), WIDE, ids=[named(task[:2]) for task in WIDE]
)
def test_aligned_rows_are_read_and_written_128_bits_at_a_time(
    compiled, target, form, stored, state
):
    """Or 64, where a thread has 4 elements of 16 bits."""
    opcodes = [each.opcode for each in compiled[target, form].program.kernel.instructions]
    loads, stores = (
        Counter(each.removeprefix(name) for each in opcodes if each.startswith(name))
        for name in ("ld.global.", "st.global.")
    )
    del loads["b64"]  # of rows, and of their order
    # Gradients, once for heads and once for what is added, and mean squares: then the table.
    assert loads == Counter({state: 3}) + Counter({stored: 1})
    assert stores == Counter({state: 1}) + Counter({stored: 1}) + Counter({"b32": 1})  # the verdict


@pytest.mark.parametrize(
    "name", ["no barrier before state of rows is written", "a row's lock is taken by all who ask"]
)
def test_a_fault_made_on_purpose_is_found(name):
    assert kernel_mutations.run(name).by is not None
