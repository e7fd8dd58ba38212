"""What a user names in a module of their own."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from importlib import import_module
from typing import Any

import click


def named(argument: str, text: str) -> Any:
    """What ``MODULE:NAME`` is: modules of the folder that the command runs in can be imported.

    Args:
        argument: Of the command, as its help calls it.
        text: What it was given.

    Raises:
        click.BadParameter: If there is none.
    """
    bad = partial(click.BadParameter, param_hint=f"'{argument}'")
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise bad(f"must be MODULE:NAME, such as my_module:name, got {text!r}")
    if os.getcwd() not in sys.path:  # where `python -m` looks as well, and processes do as we do
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({last.filename}:{last.lineno})" if os.path.isfile(last.filename) else ""
        raise bad(f"cannot import {module}: {type(error).__name__}: {error}{where}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise bad(f"{module} has no {name}")
        found = getattr(found, part)
    return found
