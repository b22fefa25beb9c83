"""What instances held over time: pools, models and quality, GPU time in use, starts and stops.

Of runs whose instances change, from the recording's table ``layout``; it is written whenever what a
slot holds has changed, so a row stands until the next of its slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.core.view import DRAINING, OFF, STARTING, UP, Floats, Ints
from testbed.recorder.reader import Recording


@dataclass(frozen=True, slots=True)
class Layouts:
    """The table ``layout``, in order of slot and time."""

    t_s: Floats
    instance: Ints
    pool: Ints
    model: Ints
    precision: NDArray[Any]
    state: Ints
    num_gpus: Ints

    def at(self, instance: Ints, t_s: Floats) -> Ints:
        """Row that stood for each slot at each time; of an empty slot, what it held last.

        What is asked about lies seldom before a slot's first instance; it then gets that one.
        """
        held = np.flatnonzero(self.pool >= 0)
        span_s = float(max(self.t_s.max(initial=0.0), np.max(t_s, initial=0.0))) + 1.0
        keys = self.instance[held] * span_s + self.t_s[held]
        place = np.searchsorted(keys, instance * span_s + t_s, side="right") - 1
        place = np.clip(place, 0, len(held) - 1)
        another = self.instance[held[place]] != instance
        place = np.where(another, np.minimum(place + 1, len(held) - 1), place)
        return np.asarray(held[place])


def read_layouts(recording: Recording) -> Layouts:
    """What the instances of a recording held."""
    table = recording.columns("layout")
    order = np.lexsort((np.arange(len(table["t_s"])), table["instance"]))
    names = ("t_s", "instance", "pool_index", "model", "precision", "state", "num_gpus")
    return Layouts(*(table[name][order] for name in names))


def summary(recording: Recording, duration_s: float) -> dict[str, Any]:
    """GPU time that instances took, how often they changed, and the quality that clients got.

    ``gpu_s`` counts a GPU while an instance starts, serves or drains on it; ``stops`` counts slots
    that fell empty (not those that took another instance at once); ``quality_mean_frac`` is the
    mean over completed requests of the declared quality of what finished them, where there is one.
    """
    layouts = read_layouts(recording)
    last = np.append(layouts.instance[1:] != layouts.instance[:-1], True)
    until_s = np.where(last, duration_s, np.append(layouts.t_s[1:], 0.0))
    held_s = np.maximum(0.0, until_s - layouts.t_s)
    by_state = {
        name: float((held_s * layouts.num_gpus)[layouts.state == state].sum())
        for name, state in (("starting", STARTING), ("up", UP), ("draining", DRAINING))
    }
    before = np.append(OFF, layouts.state[:-1])
    before[np.append(True, last[:-1])] = layouts.state[np.append(True, last[:-1])]
    changed = layouts.state != before
    quality = quality_frac(recording, layouts)
    quality = quality[~np.isnan(quality)]
    return {
        "gpu_s": sum(by_state.values()),
        "gpu_s_by_state": by_state,
        "starts": int((changed & (layouts.state == STARTING)).sum()),
        "stops": int((changed & (layouts.state == OFF)).sum()),
        "moved_requests": len(recording.columns("moves", "why")["why"]),
        "quality_mean_frac": float(quality.mean()) if len(quality) else None,
    }


def quality_frac(recording: Recording, layouts: Layouts) -> Floats:
    """Declared quality of what served each completed request; NaN where none is declared."""
    table = recording.columns("requests", "instance", "finished_s", "status")
    done = table["status"] == "completed"
    if not done.any() or not (layouts.pool >= 0).any():  # a run that broke off may know neither
        return np.zeros(0)
    rows = layouts.at(table["instance"][done].astype(np.int64), table["finished_s"][done])
    models = recording.columns("model_index")
    declared = {
        (int(model), str(precision)): float(quality)
        for model, precision, quality in zip(
            models["model"], models["precision"], models["quality_frac"], strict=True
        )
    }
    keys = zip(layouts.model[rows], layouts.precision[rows], strict=True)
    return np.array([declared[int(model), str(precision)] for model, precision in keys])
