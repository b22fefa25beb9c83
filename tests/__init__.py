"""Tests in this process run the sources, so that doctests can be collected from them.

The commands that tests start run the compiled engine, and `tests/emulators/test_compiled.py` holds
the two equal.
"""

import emulators

emulators.compiled.set_aside(emulators.__path__)
