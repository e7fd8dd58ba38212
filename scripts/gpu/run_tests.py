"""Runs pytest where some of its plugins may be missing, and others of other people may be there."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec

import pytest

# Of the time that all tests may take, before a test that hangs shows where.
_NEARLY_OVER = 0.9
_MOST_BESIDE = 8


def main() -> None:
    """Runs it side by side where that is possible.

    On the command line are how many seconds it may take, and the arguments of pytest.
    """
    seconds, *more = sys.argv[1:]
    arguments = ["-v", "--tb=short", "-p", "no:cacheprovider"]
    arguments += [f"--stacks-at={time.monotonic() + _NEARLY_OVER * float(seconds)}"]
    plugins = ["gpu.outcomes", "gpu.stacks"]
    if find_spec("xdist"):
        arguments += ["-n", str(min(_MOST_BESIDE, os.cpu_count() or 1))]
        plugins.append("xdist.plugin")
    # Ours alone: another's may warn, and a warning is an error.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["PYTEST_PLUGINS"] = ",".join(plugins)
    sys.exit(pytest.main([*arguments, *more]))


if __name__ == "__main__":
    main()
