"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from update_testing import THREADS


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Torch has so many threads as ``THREADS``, whatever the test makes of that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)
