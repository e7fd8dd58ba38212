"""What an update must wait for before it may touch the shared parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """One answer to the question of what an update waits for.

    Attributes:
        name: As in ``policy=``.
        exclusive: An update waits for a lock that is held until the host has seen it land.
        ordered: An update waits, on the device, for the one submitted before it.
        bound: An update waits while it could make its own staleness, or another's, exceed this.
    """

    name: str
    exclusive: bool = False
    ordered: bool = False
    bound: int | None = None


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("lock-free"),
        Policy("locked", exclusive=True),
        Policy("ordered", ordered=True),
    )
}

#: What ``policy=`` may be, in words.
ALLOWED = f"one of {', '.join(POLICIES)}, or bounded:K with an integer K >= 0"


def select_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(name, str):
        if name in POLICIES:
            return POLICIES[name]
        bounded = re.fullmatch(r"bounded:([0-9]{1,9})", name)
        if bounded is not None:
            return Policy(f"bounded:{int(bounded[1])}", bound=int(bounded[1]))
    raise ValueError(f"policy must be {ALLOWED}, got {name!r}")
