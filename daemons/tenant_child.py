"""The process that a tenant of host memory is: touches its working set and says how fast.

Started by `daemons.tenants` as a program of its own, with nothing but the standard library. It
maps its memory, fills the guaranteed part first, and then touches pages at a steady pace: low pages
more often than high ones, so that the guaranteed part is the hot one. On stdin it is told the size
of its working set (``w BYTES``); end of file ends it. What it measures goes to a small mapped file:
touches so far, the time they took, the time of a touch when all was in memory, the working set.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import struct
import sys
import time

PAGE = 4096
STATS = struct.Struct("<dddd")
PERIOD_S = 0.05
TOUCHES = 1500
"""Touches per period: some 1 % of a core while nothing has to be fetched."""


def main() -> None:
    """Run until stdin ends."""
    total_bytes, stats_path = int(sys.argv[1]), sys.argv[2]
    stats = mmap.mmap(os.open(stats_path, os.O_RDWR), STATS.size)
    pages = total_bytes // PAGE
    arena = mmap.mmap(-1, pages * PAGE)
    rng = random.Random(os.getpid())
    working = 0
    touches = spent_s = baseline_s = 0.0
    due = time.monotonic()
    while True:
        due += PERIOD_S
        ready, _, _ = select.select([0], [], [], max(0.0, due - time.monotonic()))
        if ready:
            data = os.read(0, 65536)
            if not data:
                return
            wanted = int(data.split(b"\n")[-2].split()[1]) // PAGE
            for page in range(working, min(wanted, pages)):
                arena[page * PAGE : page * PAGE + 64] = rng.randbytes(64)
            if wanted < working:
                # What leaves the working set is given back, as a guest's allocator does.
                arena.madvise(mmap.MADV_DONTNEED, wanted * PAGE, (working - wanted) * PAGE)
            working = min(wanted, pages)
            due = time.monotonic()
        if not working:
            continue
        places = [int(working * rng.random() ** 2) * PAGE for _ in range(TOUCHES)]
        begun = time.perf_counter()
        for place in places:
            arena[place] = 1
        took_s = time.perf_counter() - begun
        touches += TOUCHES
        spent_s += took_s
        each_s = took_s / TOUCHES
        # The fastest period so far is what a touch costs with everything in memory.
        baseline_s = min(baseline_s, each_s) if baseline_s else each_s
        stats[: STATS.size] = STATS.pack(touches, spent_s, baseline_s, float(working * PAGE))
        if time.monotonic() > due + PERIOD_S:
            due = time.monotonic()  # behind for good reason: do not try to catch up


if __name__ == "__main__":
    main()
