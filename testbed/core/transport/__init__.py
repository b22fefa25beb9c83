"""How messages travel: `base` has the signatures, with one sibling per implementation."""

from testbed.core import compiled

compiled.use(__name__, __path__)
