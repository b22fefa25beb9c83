"""Emulated GPUs, servers and memory: physics that is told the time.

The engine and its timing are plain Python. Where they have been compiled (`testbed.core.compiled`),
the compiled ones are imported in their place.
"""

from testbed.core import compiled

compiled.use(__name__, __path__)
