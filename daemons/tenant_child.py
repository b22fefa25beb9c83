"""The process that a tenant of host memory is: touches its working set and says how fast.

Started by `daemons.tenants` as a program of its own, with nothing but the standard library. It
maps its memory, fills and locks the guaranteed part, and then touches pages at a steady pace: low
pages more often than high ones, so that the guaranteed part is the hot one. On stdin it is told the
size of its working set (``w BYTES``); end of file ends it. What it measures goes to a small mapped
file: touches so far, the time they took, the time of a touch when all was in memory, the working
set, and how much of its memory is locked.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import select
import struct
import sys
import time

PAGE = 4096
STATS = struct.Struct("<ddddd")
PERIOD_S = 0.05
TOUCHES = 1500
"""Touches per period: some 1 % of a core while nothing has to be fetched."""


def lock(arena: mmap.mmap, size_bytes: int) -> int:
    """Keep the arena's first bytes in memory whatever the group's limit; how many that worked for.

    ``mlock(2)``. What is locked counts against the group's limit but is never reclaimed, on every
    version of cgroups.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(arena))
    done = libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes)) == 0
    return size_bytes if done else 0


def main() -> None:
    """Run until stdin ends."""
    total_bytes, guaranteed_bytes, stats_path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    stats = mmap.mmap(os.open(stats_path, os.O_RDWR), STATS.size)
    pages = total_bytes // PAGE
    # Private, for of shared memory nothing can be given back; in small pages, as all is counted in.
    arena = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        arena.madvise(mmap.MADV_NOHUGEPAGE)
    rng = random.Random(os.getpid())
    own = min(guaranteed_bytes // PAGE, pages)
    filled = working = 0
    locked_bytes = -1
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
            working = min(wanted, pages)
            held = max(working, own)
            for page in range(filled, held):
                arena[page * PAGE : page * PAGE + 64] = rng.randbytes(64)
            if held < filled:
                # What leaves the working set is given back, as a guest's allocator does.
                arena.madvise(mmap.MADV_DONTNEED, held * PAGE, (filled - held) * PAGE)
            filled = held
            if locked_bytes < 0:
                # Only now: by the first word from outside, this process is in its group.
                locked_bytes = lock(arena, own * PAGE) if own else 0
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
        stats[: STATS.size] = STATS.pack(
            touches, spent_s, baseline_s, float(working * PAGE), float(locked_bytes)
        )
        if time.monotonic() > due + PERIOD_S:
            due = time.monotonic()  # behind for good reason: do not try to catch up


if __name__ == "__main__":
    main()
