"""Tests in this process run the sources, so that doctests can be collected from them.

The commands that tests start run the compiled engine, and `tests/emulators/test_compiled.py` holds
the two equal.
"""

import emulators
import testbed.coordinator
import testbed.shells

for _package in (emulators, testbed.coordinator, testbed.shells):
    emulators.compiled.set_aside(_package.__path__)
