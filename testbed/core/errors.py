"""The errors a user may meet, each saying which field is wrong, its value and what is allowed."""

from __future__ import annotations


class TestbedError(Exception):
    """Base of every error whose text is for the user; the command line prints it in one line."""

    __test__ = False  # pytest would take the name for a test class


class SpecError(TestbedError):
    """A run specification cannot be used. The text names the field, the value and the range."""


class TraceError(TestbedError):
    """A workload file is missing or has a row that cannot be read. The text names file and row."""


class PolicyError(TestbedError):
    """A policy file or class cannot be loaded, or the policy said something impossible."""


class DeviceError(TestbedError):
    """A device refused or failed. ``lost`` is set when it will not come back by itself."""

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class TransportError(TestbedError):
    """A socket cannot be opened, or a peer broke the protocol."""


class RecordingError(TestbedError):
    """A recording is missing, incomplete or of another version."""
