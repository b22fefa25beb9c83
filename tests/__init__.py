"""Tests in this process run the sources, so that doctests can be collected from them.

The commands that tests start run the compiled engine, and `tests/core/test_compiled.py` holds
the two equal.
"""

import emulators
import testbed.coordinator
import testbed.core.transport
import testbed.shells
from testbed.core import compiled

for _package in (emulators, testbed.coordinator, testbed.core.transport, testbed.shells):
    compiled.set_aside(_package.__path__)
