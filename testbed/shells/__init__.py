"""The shells around the control plane: what waits, jumps, connects and starts processes."""

from testbed.core import compiled

compiled.use(__name__, __path__)
