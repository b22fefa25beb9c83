"""The control loop: what is known of the cluster, who decides, and what nodes are told."""

from testbed.core import compiled

compiled.use(__name__, __path__)
