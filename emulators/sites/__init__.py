"""Outside temperature of a typical year at the sites we ship (see README.md beside this).

>>> site = load_site("phoenix_az")
>>> len(site.dry_bulb_c), bool(site.outside_c(0.0) == site.dry_bulb_c[0])
(8760, True)
>>> load_site("atlantis")
Traceback (most recent call last):
...
testbed.core.errors.SpecError: site 'atlantis' is none of: phoenix_az, san_jose_ca, seattle_wa
"""

from __future__ import annotations

import csv
import gzip
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np

from testbed.core.errors import SpecError
from testbed.core.view import Floats

HOURS = 8760


class Site(NamedTuple):
    """A place and its weather."""

    name: str
    dry_bulb_c: Floats
    """Air temperature at each hour of the year, degrees Celsius; hour 0 ends at 1 January 01:00."""

    def outside_c(self, hour: float) -> float:
        """Air temperature at an hour of the year, between hours a straight line."""
        low = int(hour // 1) % HOURS
        part = hour % 1.0
        first, then = self.dry_bulb_c[low], self.dry_bulb_c[(low + 1) % HOURS]
        return float(first + part * (then - first))


@cache
def _table() -> dict[str, Floats]:
    data = (resources.files(__name__) / "dry_bulb.csv.gz").read_bytes()
    names, *rows = csv.reader(gzip.decompress(data).decode().splitlines())
    tenths = np.array(rows, dtype=np.int64)
    return {name: tenths[:, place] / 10.0 for place, name in enumerate(names)}


def load_site(name: str) -> Site:
    """The site called ``name``.

    Raises:
        SpecError: there is none.
    """
    table = _table()
    if name not in table:
        raise SpecError(f"site {name!r} is none of: {', '.join(sorted(table))}")
    return Site(name, table[name])
