"""hogstream without its optional packages: it imports, says what is missing, and updates."""

from __future__ import annotations

import json
from typing import Any

import pytest

from process_testing import run_python

pytestmark = pytest.mark.slow
OPTIONAL = ["click", "jinja2", "matplotlib", "numba", "rich", "sklearn", "triton"]

# A module that is None in sys.modules cannot be imported, nor found.
WITHOUT_OPTIONAL = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))

import json, torch
from hogstream.kernels import available_backends, rmsprop_
from hogstream.optim import RMSpropAsync

def error(backend):
    try:
        rmsprop_(*torch.ones(3, 5), backend=backend)
    except RuntimeError as error:
        return str(error)

param, grad, ms = torch.ones(3, 5)
rmsprop_(param, grad, ms)
module_param = torch.nn.Parameter(torch.ones(5))
optimizer = RMSpropAsync([module_param])
module_param.grad = torch.ones(5)
optimizer.step()
print(json.dumps({{
    "backends": available_backends(),
    "errors": {{name: error(name) for name in ("numba", "triton")}},
    "updated": [param.tolist(), ms.tolist(), module_param.tolist()],
}}))
"""


@pytest.fixture(scope="module")
def without_optional() -> Any:
    return json.loads(run_python("-c", WITHOUT_OPTIONAL))


def test_says_what_to_install(without_optional):
    backends = without_optional["backends"]
    assert backends["numpy"] is None
    assert "pip install 'hogstream[cpu]'" in backends["numba"]
    assert "pip install triton" in backends["triton"]


@pytest.mark.parametrize("name", ["numba", "triton"])
def test_refuses_a_missing_backend_by_name(without_optional, name):
    reason = without_optional["backends"][name]
    assert without_optional["errors"][name] == f"backend {name!r} is not available: {reason}"


def test_updates_with_numpy(without_optional):
    param, ms, module_param = without_optional["updated"]
    assert ms == [1.0] * 5  # .99 + .01
    assert param == pytest.approx([0.99] * 5)
    assert module_param == pytest.approx([0.9] * 5)


def test_triton_needs_a_device_or_its_interpreter():
    code = "import hogstream.kernels as k; print(k.available_backends()['triton'])"
    reason = run_python("-c", code, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert "no CUDA or ROCm device" in reason
    assert "TRITON_INTERPRET=1" in reason


def test_import_loads_no_compiler():
    # torch imports what it likes; hogstream adds neither compiler until it is used.
    code = """
import sys, torch
before = set(sys.modules)
import hogstream.kernels
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    assert not {"numba", "llvmlite", "triton"} & set(run_python("-c", code).split())
