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


# What Python makes of a compiler that is installed, and does not fit what else is.
BROKEN = {
    "ModuleNotFoundError, as half of it is left": "",
    "ImportError": "raise ImportError('needs NumPy 2.2 or less.\\nGot NumPy 2.4.')",
    "ModuleNotFoundError": "import no_such_module",
    "SystemError": "raise SystemError('initialization of _internal failed')",
    "AttributeError": "import numpy; numpy.no_such_name",
    "SyntaxError": "print 'of another Python'",
}
USED_ALL_THE_SAME = """
import sys, json, torch
from hogstream.kernels import available_backends, rmsprop_
param, grad, ms = torch.ones(3, 5)
rmsprop_(param, grad, ms)
try:
    rmsprop_(*torch.ones(3, 5), backend=sys.argv[1])
except RuntimeError as error:
    refused = str(error)
missing = available_backends()[sys.argv[1]]
assert refused == f"backend {sys.argv[1]!r} is not available: {missing}", refused
print(json.dumps([missing, param.tolist()]))
"""
# Each folder in a child of its own, of one parent that has imported torch and the other compiler.
IN_EACH_FOLDER = f"""
import importlib.util, os, sys, torch
_, package, *folders = sys.argv
for other in {{"numba", "triton"}} - {{package}}:
    if importlib.util.find_spec(other):
        importlib.import_module(other)
assert not any(name.split(".")[0] in ("hogstream", package) for name in sys.modules)
sys.argv[1:] = [package]
for folder in folders:
    child = os.fork()
    if child == 0:
        sys.path.insert(0, folder)
        exec({USED_ALL_THE_SAME!r})
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, folder
"""


@pytest.fixture(scope="module", params=["numba", "triton"])
def broken(request, tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """A compiler, and what is said and done without it, by what is wrong with it."""
    folders = [tmp_path_factory.mktemp("broken") for _ in BROKEN]
    for folder, code in zip(folders, BROKEN.values(), strict=True):
        (folder / f"{request.param}.py").write_text(code)
    said = run_python(
        *("-c", IN_EACH_FOLDER, request.param, *map(str, folders)), TRITON_INTERPRET="1"
    )
    return request.param, dict(zip(BROKEN, map(json.loads, said.splitlines()), strict=True))


@pytest.mark.parametrize("error", BROKEN)
def test_a_compiler_that_cannot_be_imported_is_done_without(broken, error):
    package, said = broken
    missing, param = said[error]
    kind = error.partition(",")[0]
    begins = f"{package.title()} is installed, but cannot be imported: {kind}: "
    assert missing.startswith(begins)
    assert "\n" not in missing
    assert param == pytest.approx([0.99] * 5)


def test_numba_that_is_told_not_to_compile_is_done_without():
    pytest.importorskip("numba")
    said = run_python("-c", USED_ALL_THE_SAME, "numba", NUMBA_DISABLE_JIT="1")
    missing, param = json.loads(said)
    assert missing == "Numba compiles nothing, as NUMBA_DISABLE_JIT is set"
    assert param == pytest.approx([0.99] * 5)


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
