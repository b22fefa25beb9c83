"""How long one evaluation of the cost model takes: once for a scalar, once for a row of GPUs."""

from __future__ import annotations

import timeit

import numpy as np

from emulators.models import load_model
from emulators.profiles import load_gpu
from emulators.timing import IterationCost

_ROW = 10_000


def bench_evaluation(gpu: str = "h100-sxm", model: str = "llama-3.1-8b") -> dict[str, float]:
    """Microseconds of CPU, the best of five repeats: of one iteration's time, of its work, and of
    an iteration's time on 10,000 GPUs at once, per GPU.

    Args:
        gpu: a GPU profile.
        model: a model card.
    """
    one = IterationCost(load_model(model), load_gpu(gpu))
    many, none = np.full(_ROW, 32.0), np.zeros(_ROW)
    clock_frac = np.linspace(0.3, 1.0, _ROW)

    def work() -> None:
        one.base_flops(64, 512, 1, 0)
        one.base_bytes(64, 512, 1, 0)

    def row() -> None:
        one.iterations_s(many, many * 800, none, none, none, none, clock_frac)

    def best_us(what: timeit._Stmt, number: int) -> float:
        return 1e6 * min(timeit.repeat(what, number=number, repeat=5)) / number

    return {
        "time_us": best_us(lambda: one.base_s(64, 512, 1, 0, 1.0), 20_000),
        "work_us": best_us(work, 20_000),
        "row_us_per_gpu": best_us(row, 5) / _ROW,
    }
