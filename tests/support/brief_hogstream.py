"""The command ``hogstream`` with brief measurements of what is around the one that is asked for.

Tests run it as a script where the command must have a process of its own.
"""

from __future__ import annotations

import signal
from importlib import import_module

#: Kernels by themselves are measured on few elements, and ceilings a millisecond at a time.
BRIEF = {
    "hogstream.profiling.measure.kernels": ("ELEMENTS", 1 << 16),
    "hogstream.profiling.turns": ("_SAMPLE_SECONDS", 1e-3),
}


def main() -> None:
    """Runs the command, which Ctrl-C ends."""
    from hogstream.cli.main import main as hogstream

    for module, (name, value) in BRIEF.items():
        setattr(import_module(module), name, value)
    # Whoever runs the tests in the background may have them, and so the command, ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hogstream()


if __name__ == "__main__":  # and not in a process that is spawned, which imports this
    main()
