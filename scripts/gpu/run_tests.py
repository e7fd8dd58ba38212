"""Runs pytest where some of its plugins may be missing, and others of other people may be there."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest

# A test that takes so long shows where it is.
_SLOW_SECONDS = 15
_MOST_BESIDE = 8


def main() -> None:
    """Runs it with the arguments of the command line, side by side where that is possible."""
    arguments = ["-v", "--tb=short", "-p", "no:cacheprovider"]
    arguments += ["-o", f"faulthandler_timeout={_SLOW_SECONDS}"]
    plugins = ["gpu.outcomes"]
    if find_spec("xdist"):
        arguments += ["-n", str(min(_MOST_BESIDE, os.cpu_count() or 1))]
        plugins.append("xdist.plugin")
    # Ours alone: another's may warn, and a warning is an error.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["PYTEST_PLUGINS"] = ",".join(plugins)
    sys.exit(pytest.main([*arguments, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
