"""The workloads that come with hogstream, each imported when it is asked for."""

from __future__ import annotations

#: Where each of them is, by name.
WORKLOADS = {
    "cartpole": "hogstream.workloads.cartpole:CARTPOLE",
    "digits": "hogstream.workloads.digits:DIGITS",
    "pong": "hogstream.workloads.pong:PONG",
}
