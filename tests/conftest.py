"""Settings that every test runs under."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

HAS_DEVICE = torch.cuda.is_available()

# Triton reads this when a kernel is defined, so it is set before any test imports one.
if not HAS_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"

# A first example may compile a kernel: no deadline fits both it and the others.
hypothesis.settings.register_profile("hogstream", deadline=None, max_examples=50)
hypothesis.settings.load_profile("hogstream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_DEVICE:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
