"""What it takes to start an instance and to re-shard one: seconds and bytes, in closed form.

Three ways lead to a running instance. All numbers are fields of `Delays`, with their marks; the
structure is this file's:

- *cold*: a node that held nothing boots a virtual machine and initialises its GPUs; the weights
  come from cluster storage at ``storage_bytes_per_s``, the engine starts, weights and KV cache go
  onto the GPUs. Llama2-70B on an empty node: 90 + 120 + 179 + 18 + 15 s = 7.0 minutes, where
  summaries of DynamoLLM say 6 to 8 for an 8xH100 instance (uncertain).
- *snapshot*: the weights wait in host memory and cross PCIe, one GPU's shard per link; the engine
  is restored with its graphs captured.
- *re-shard*: the same weights on overlapping GPUs in another shape. GPU ranks of the new shape are
  matched to GPUs so that the fewest bytes move (a maximum-weight bipartite matching of current and
  target shards, as DynamoLLM does); what is missing is copied over NVLink from the GPUs that hold
  it, evenly; then a fixed time to synchronise.

A shard of a tensor-parallel model is taken as an interval of every matrix: rank r of t holds
[r/t, (r+1)/t). Weights that every rank copies (norms) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from testbed.core.messages import Delays
from testbed.core.view import Floats


@dataclass(frozen=True, slots=True)
class Start:
    """How long a start takes, and when in it the weights stream into the GPUs' memory."""

    duration_s: float
    copy_from_s: float
    copy_to_s: float


def start(
    delays: Delays,
    how: Literal["snapshot", "cold"],
    weight_bytes: float,
    tp: int,
    *,
    boots: bool,
    scale: float = 1.0,
) -> Start:
    """A start from nothing.

    Args:
        delays: constants.
        how: from a snapshot in host memory, or cold from storage.
        weight_bytes: of the whole model.
        tp: GPUs that share it.
        boots: whether a cold start finds an empty node, which boots first.
        scale: multiplies all times.

    >>> round(start(Delays(), "cold", 138e9, 8, boots=True).duration_s / 60, 1)
    7.0
    >>> round(start(Delays(), "snapshot", 138e9, 8, boots=True).duration_s, 2)
    3.34
    """
    if how == "snapshot":
        copy_s = weight_bytes / tp / delays.pcie_bytes_per_s
        return Start(scale * (copy_s + delays.warm_s), 0.0, scale * copy_s)
    before_s = weight_bytes / delays.storage_bytes_per_s + delays.engine_s
    if boots:
        before_s += delays.vm_s + delays.gpu_init_s
    end_s = before_s + delays.load_s
    return Start(scale * end_s, scale * before_s, scale * end_s)


@dataclass(frozen=True, slots=True)
class Reshard:
    """Bytes that each GPU takes in and gives out, and how long it takes."""

    in_bytes: dict[int, float]
    out_bytes: dict[int, float]
    copy_s: float
    duration_s: float


def reshard(
    delays: Delays,
    weight_bytes: float,
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    nvlink_bytes_per_s: float,
    *,
    scale: float = 1.0,
) -> Reshard:
    """From the instances ``before`` to those ``after``, each given as its GPUs in order of rank.

    Args:
        delays: constants; its ``nvlink_bytes_per_s``, if set, is used in place of the argument.
        weight_bytes: of the whole model.
        before: GPUs of each instance that holds the model now.
        after: GPUs of each instance that shall hold it.
        nvlink_bytes_per_s: of one GPU, one way.
        scale: multiplies all times.

    Two instances of 4 that become one of 8 have all they need: each GPU drops half of its quarter.
    One of 4 that spreads over 8 moves half of the weights. One of 8 that becomes two of 4 needs a
    second copy, and half of the GPUs need a quarter that they have no part of.

    >>> halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    >>> def moved(before, after):
    ...     result = reshard(Delays(), 138e9, before, after, 450e9)
    ...     return sum(result.in_bytes.values()) / 138e9, round(result.duration_s, 3)
    >>> moved(halves, [range(8)]), moved(halves[:1], [range(8)]), moved([range(8)], halves)
    ((0.0, 0.05), (0.5, 0.088), (1.5, 0.127))
    """
    units = lcm(*(len(gpus) for gpus in (*before, *after)))
    holds: dict[int, Floats] = {gpu: np.zeros(units) for gpus in after for gpu in gpus}
    for gpus in before:
        for rank, gpu in enumerate(gpus):
            holds[gpu] = _shard(rank, len(gpus), units)
    needs: dict[int, Floats] = {}
    for gpus in after:
        needs |= _matched(list(gpus), holds, units)
    holders = np.sum(list(holds.values()), axis=0)
    missing = {gpu: need * (1.0 - holds[gpu]) for gpu, need in needs.items()}
    asked = np.sum(list(missing.values()), axis=0)
    unit_bytes = weight_bytes / units
    in_bytes = {gpu: float(need.sum()) * unit_bytes for gpu, need in missing.items()}
    out_bytes = {
        gpu: float((held * asked / np.maximum(holders, 1.0)).sum()) * unit_bytes
        for gpu, held in holds.items()
    }
    rate = delays.nvlink_bytes_per_s or nvlink_bytes_per_s
    most = max(max(in_bytes.values()), max(out_bytes.values()))
    copy_s = scale * most / rate
    return Reshard(in_bytes, out_bytes, copy_s, copy_s + scale * delays.sync_s)


def _shard(rank: int, tp: int, units: int) -> Floats:
    """1 for each unit of the weights that a rank holds."""
    held = np.zeros(units)
    held[rank * units // tp : (rank + 1) * units // tp] = 1.0
    return held


def _matched(gpus: list[int], holds: Mapping[int, Floats], units: int) -> dict[int, Floats]:
    """The shard that each GPU of a new instance gets: as much of it there already as can be."""
    tp = len(gpus)
    shards = [_shard(rank, tp, units) for rank in range(tp)]
    kept = np.array([[holds[gpu] @ shard for shard in shards] for gpu in gpus])
    rows, ranks = linear_sum_assignment(kept, maximize=True)
    return {gpus[row]: shards[rank] for row, rank in zip(rows, ranks, strict=True)}
