"""What must hold of kernels that look at rows and copy them, as PTX; and all checks of a form."""

from __future__ import annotations

from itertools import product

import torch

from hogstream.kernels.verdicts import OUTSIDE
from ptx_checks import check_form
from ptx_compiling import Compiled
from ptx_machine import Launch, execute, race
from ptx_rows import check_row_form
from ptx_updates import STRIPES, Device, locks_of
from update_testing import COMPUTE, normal

_TABLE_ROWS = 23


def check_any(compiled: Compiled) -> int:
    """Runs all checks of a kernel of whatever form, and returns how many elements were compared."""
    if not compiled.form.of_rows:
        return check_form(compiled)
    if compiled.form.updates:
        return check_row_form(compiled)
    return check_copies(compiled) if compiled.form.columns else check_range(compiled)


def check_range(compiled: Compiled) -> int:
    """Looks at rows that are in the table, and at rows of which one is not."""
    rows = torch.arange(_TABLE_ROWS)
    inside = [rows, rows[:1], rows[-1:], rows[3:4].repeat(5)]
    outside = [
        torch.cat([torch.tensor([-1]), rows]),
        torch.cat([rows, torch.tensor([_TABLE_ROWS])]),
        torch.tensor([-(1 << 62)]),
        torch.tensor([1 << 62]),
    ]
    cases = [*((each, 0) for each in inside), *((each, OUTSIDE) for each in outside)]
    for given, expected in cases:
        device = Device()
        verdict = device.put("verdict", torch.zeros(1, dtype=torch.int32))
        put = device.put("rows", given)
        arguments = [put.data_ptr(), len(put), _TABLE_ROWS, verdict.data_ptr()]
        execute(device.launch(compiled, 1, arguments), device.memory)
        assert verdict.item() == expected, f"{given.tolist()} of {_TABLE_ROWS} rows"
    return len(cases)


class _Copy:
    """A copy of rows, ready to be made.

    Attributes:
        device: Where.
        launch: It.
    """

    def __init__(self, compiled: Compiled, width: int, rows: torch.Tensor, offset: int) -> None:
        """Puts all there.

        Args:
            compiled: A form.
            width: Of the table.
            rows: Which rows.
            offset: By how many elements it lies off its alignment.
        """
        form, self.device = compiled.form, Device()
        dtype = getattr(torch, form.dtype)
        assert dtype in COMPUTE
        values = normal(_TABLE_ROWS * width, dtype, seed=width).view(_TABLE_ROWS, width)
        put, self._rows = self.device.put, rows
        self._table = put("table", values, offset)
        self._copies = put("copies", torch.full((len(rows), width), 7, dtype=dtype), offset)
        self._verdict = put("verdict", torch.zeros(1, dtype=torch.int32))
        self._locks = put("locks", torch.zeros(STRIPES, dtype=torch.int32)) if form.locked else None
        arguments = [
            *(each.data_ptr() for each in (self._table, self._copies, put("rows", rows))),
            *(len(rows), _TABLE_ROWS, width // form.unit, self._verdict.data_ptr()),
            *locks_of(self._locks),
        ]
        programs = -(-len(rows) // compiled.block)
        self.launch: Launch = self.device.launch(compiled, programs, arguments)

    def check(self) -> int:
        """Checks what it has made."""
        inside = (self._rows >= 0) & (self._rows < _TABLE_ROWS)
        expected = torch.full_like(self._copies, 7)
        expected[inside] = self._table[self._rows[inside]]
        assert torch.equal(self._copies, expected)
        assert self._verdict.item() == (0 if inside.all() else OUTSIDE)
        assert self._locks is None or not self._locks.any(), "a lock is held still"
        return self._copies.numel()


def check_copies(compiled: Compiled) -> int:
    """Copies rows in any order, some twice and some that are not there."""
    form, compared = compiled.form, 0
    offset = 0 if form.unit > 1 else 1
    widths = [form.columns, form.columns // 2 + form.unit, 2 * form.columns + 3 * form.unit]
    generator = torch.Generator().manual_seed(0)
    many = torch.randint(0, _TABLE_ROWS, (2 * compiled.block + 5,), generator=generator)
    strange = many.clone()
    strange[[0, 2, -1]] = torch.tensor([-1, 1 << 62, _TABLE_ROWS])
    for width, rows in product(widths, [many, many[:1], strange, strange[-1:]]):
        copy = _Copy(compiled, width // form.unit * form.unit, rows, offset)
        execute(copy.launch, copy.device.memory)
        compared += copy.check()
    for seed in range(2):
        copy = _Copy(compiled, widths[0], many[:9], offset)
        race([copy.launch], copy.device.memory, seed)
        copy.check()
    return compared
