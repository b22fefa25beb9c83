"""What an opaque VM does to its GPUs: nobody outside knows its work, only how much of it there is.

Its work at full load is that of a well-filled serving batch: a third of the tensor cores' rate and
two fifths of the memory's (assumed), which draws 660 W on an H100. At a lower clock the same work
takes longer; once it no longer fits, less of it is done.
"""

from __future__ import annotations

import numpy as np

from emulators.power import slowdown
from emulators.profiles import GpuProfile
from testbed.core.view import Floats

TENSOR_FRAC, HBM_FRAC = 0.3, 0.4


def opaque_activity(
    profile: GpuProfile, load_frac: Floats, clock_frac: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """Busy, tensor and memory shares of GPUs at a load and clock, and how much slower work runs.

    Args:
        profile: of the GPUs.
        load_frac: work asked for over what the GPU could do at full clock.
        clock_frac: SM clock over the highest.

    >>> from emulators.profiles import load_gpu
    >>> busy, tensor, _, times = opaque_activity(load_gpu("h100-sxm"), np.ones(1), np.full(1, 0.6))
    >>> round(float(busy[0]), 6), bool(tensor[0] < 0.3), bool(1.0 < times[0] < 1 / 0.6)
    (1.0, True, True)
    """
    times = slowdown(profile, clock_frac, 1.0, TENSOR_FRAC, 1.0)
    done = np.minimum(load_frac, 1.0 / times)
    return done * times, done * TENSOR_FRAC, done * HBM_FRAC, times
