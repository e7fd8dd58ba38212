"""What an update must wait for before it may touch the shared parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """One answer to the question of what an update waits for.

    Attributes:
        name: As in ``policy=``.
        exclusive: An update waits for a lock that is held until the host has seen it land.
        ordered: An update waits, on the device, for the one submitted before it.
    """

    name: str
    exclusive: bool = False
    ordered: bool = False


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("lock-free"),
        Policy("locked", exclusive=True),
        Policy("ordered", ordered=True),
    )
}


def select_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]
