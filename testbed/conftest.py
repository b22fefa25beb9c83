"""Whichever folder pytest is given, the sources are what it imports."""

import tests  # noqa: F401
