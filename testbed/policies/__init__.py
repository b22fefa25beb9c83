"""Policies: one policy, one file, pure. From what is known to what is asked.

A policy is a plain class. Its constructor's keyword arguments are its parameters in the run file;
``step(view)`` (a controller) or ``route(request, view)`` (a router) is all it does. It does no I/O
and reads no clock, and so runs the same in virtual time, on emulated nodes and on real GPUs.
"""

from testbed.core.messages import Request
from testbed.core.view import (
    Command,
    Controller,
    DrainInstance,
    LockClocks,
    OrderQueue,
    Placement,
    PlaceVm,
    RecallWaiting,
    Router,
    SetBatch,
    SetLayout,
    SetMemoryLimit,
    SetPowerLimit,
    Squash,
    View,
)

__all__ = [
    "Command",
    "Controller",
    "DrainInstance",
    "LockClocks",
    "OrderQueue",
    "PlaceVm",
    "Placement",
    "RecallWaiting",
    "Request",
    "Router",
    "SetBatch",
    "SetLayout",
    "SetMemoryLimit",
    "SetPowerLimit",
    "Squash",
    "View",
]
