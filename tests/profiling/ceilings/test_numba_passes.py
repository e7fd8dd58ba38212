"""Passes over rows without arithmetic: they touch what an update touches, and nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from hogstream.kernels.rows import RowUpdate, check_row_operands
from hogstream.profiling.ceilings.numba_passes import update_shaped_rows


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize(("rows", "width", "updated"), [(7, 1, 3), (50, 19, 50), (9000, 64, 4096)])
def test_a_gradient_is_added_to_its_row_and_its_ms(rows, width, updated, ahead, alone):
    touched = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:updated]
    param, ms = torch.full((rows, width), 2.0), torch.full((rows, width), 5.0)
    grads = torch.arange(updated * width, dtype=torch.float32).reshape(updated, width)
    update = RowUpdate.of(check_row_operands(param, touched, grads, ms))
    update_shaped_rows(update, ahead, alone=alone)
    expected = torch.zeros(rows, width)
    expected[touched] = grads
    assert torch.equal(param, 2 + expected)
    assert torch.equal(ms, 5 + expected)
