"""An instance in the mean: batch, speed and activity at an arrival rate, without single requests.

For clusters and days that are too long to serve request by request. The same iteration times and
work as the engine's (`emulators.timing`), put into a balance instead of being played: with ``n``
sequences decoding, an iteration takes ``d(n)``, and one that also takes in a prompt ``m(n)``
longer. Requests of ``o`` output tokens leave at the rate

    rate(n) = n / ((o - 1) d(n) + n m(n))

since each takes part in ``o - 1`` iterations and each of the ``n`` waits for every other's prompt.
Requests in an instance that is not full are Poisson with mean ``v``: it is busy for ``1 - exp(-v)``
of the time, with ``n = v / busy`` then. Agreement with the engine: tests/emulators/test_fluid.py.

What it leaves out: queues shorter than a step of time, the spread of latencies over requests,
several prompts in one iteration, preemption.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emulators.timing import IterationCost
from testbed.core.view import Floats, Ints

_Work = Callable[[int, int, int, int], float]
_LOADS = 49
_FLOWS = 33
"""Points of a table over utilisation."""
CLOCKS = np.linspace(0.25, 1.0, 16)
"""SM clocks over the highest that tables hold."""


class Lengths(NamedTuple):
    """Moments of the token counts of requests: means, and means of squares."""

    prompt_tokens: float
    prompt_tokens2: float
    output_tokens: float
    output_tokens2: float

    @classmethod
    def of(cls, prompt_tokens: Floats | Ints, output_tokens: Floats | Ints) -> Lengths:
        """Of a sample."""
        prompt, output = np.asarray(prompt_tokens, float), np.asarray(output_tokens, float)
        return cls(
            float(prompt.mean()),
            float((prompt**2).mean()),
            float(output.mean()),
            float((output**2).mean()),
        )


class Flow(NamedTuple):
    """An instance in the mean, per GPU where it is about GPUs; arrays over instances."""

    busy_frac: Floats
    tensor_frac: Floats
    hbm_frac: Floats
    num_running: Floats
    itl_s: Floats
    """Mean gap between tokens."""
    itl_prefill_s: Floats
    """A gap in which another's prompt is taken in: about the 99th percentile under load."""
    ttft_s: Floats
    """Mean time to first token, without waiting for a place in the batch."""


class FlowTable(NamedTuple):
    """A configuration of an instance over clock and utilisation."""

    capacity_rps: Floats
    """Per clock of `CLOCKS`: the rate at which the batch is full."""
    flows: Floats
    """(clock, utilisation, field of `Flow`)."""


def flow_table(cost: IterationCost, lengths: Lengths, max_num_seqs: int) -> FlowTable:
    """Tabulate a configuration.

    Args:
        cost: the model on its GPUs.
        lengths: of its requests.
        max_num_seqs: most sequences in a batch; KV memory may allow fewer.

    Raises:
        ValueError: the model leaves no room for a request.
    """
    tokens = lengths.prompt_tokens + lengths.output_tokens
    room = cost.kv_blocks() * 16 / tokens
    if room < 1.0:
        raise ValueError(f"{cost.model.name} on {cost.tp} GPUs leaves no memory for a request")
    most = min(float(max_num_seqs), room)
    in_system = np.concatenate([np.geomspace(0.01, 3.0, 16), np.geomspace(3.5, most, _LOADS - 16)])
    in_system = np.unique(np.minimum(in_system, most))
    capacities: list[float] = []
    flows: list[Floats] = []
    for clock in CLOCKS:
        rate, columns = _balance(cost, lengths, in_system, float(clock))
        # More in the batch may not serve more; past the best rate nothing is gained.
        best = int(np.argmax(rate)) + 1
        capacities.append(float(rate[best - 1]))
        grid = np.linspace(0.0, rate[best - 1], _FLOWS)
        known = np.concatenate([[0.0], rate[:best]])
        first = _idle(columns)
        flows.append(
            np.column_stack(
                [
                    np.interp(grid, known, np.concatenate([[zero], column[:best]]))
                    for zero, column in zip(first, columns, strict=True)
                ]
            )
        )
    return FlowTable(np.array(capacities), np.array(flows))


def _idle(columns: Flow) -> tuple[float, ...]:
    """At no load: nothing is done; a request that came would be served as the first one is."""
    return (0.0, 0.0, 0.0, 0.0, *(float(column[0]) for column in columns[4:]))


def _balance(
    cost: IterationCost, lengths: Lengths, in_system: Floats, clock: float
) -> tuple[Floats, Flow]:
    """Rates and flows with so many requests in the instance on average."""
    gpu = cost.gpu
    busy = 1.0 - np.exp(-in_system)
    n = in_system / busy
    prompt, output = lengths.prompt_tokens, lengths.output_tokens
    # A running sequence is met in proportion to its length: half of its squared mean over the mean.
    context = n * (prompt + lengths.output_tokens2 / (2.0 * output))
    pairs = lengths.prompt_tokens2 / 2.0
    decode_s = cost.iterations_s(n, context, 0.0, 0.0, 0.0, 0.0, clock)  # type: ignore[arg-type]
    mixed_s = cost.iterations_s(n, context, prompt, pairs, 1.0, 0.0, clock)  # type: ignore[arg-type]
    prefill_s = mixed_s - decode_s
    steps = max(output - 1.0, 0.0)
    rate = n / (steps * decode_s + n * prefill_s)
    iterations = (1.0 - rate * prefill_s) / decode_s

    whole = np.arange(int(n.max()) + 2)

    def work(fixed: _Work, per_context: float, per_pair: float) -> Floats:
        plain, mixed = (
            np.interp(n, whole, [fixed(k, tokens, prompts, 0) for k in whole.tolist()])
            for tokens, prompts in ((0, 0), (round(prompt), 1))
        )
        done: Floats = iterations * (plain + per_context * context)
        return done + rate * (mixed - plain + per_pair * pairs)

    flops = work(cost.base_flops, cost.flops_per_context_token, cost.flops_per_pair)
    moved = work(cost.base_bytes, cost.bytes_per_context_token, cost.bytes_per_pair)
    # Prompts wait for each other as in a queue with constant service.
    prompt_load = np.minimum(rate * prefill_s, 0.95)
    waits = 1.0 + prompt_load / (2.0 * (1.0 - prompt_load))
    return busy * rate, Flow(
        busy,
        busy * flops / gpu.peak_flops,
        busy * moved / gpu.hbm_bytes_per_s,
        in_system,
        1.0 / np.maximum(iterations, 1e-9),
        mixed_s,
        0.5 * decode_s * busy + mixed_s * waits,
    )


class FlowTables:
    """Tables of many configurations, looked up for many instances at once."""

    def __init__(self, tables: list[FlowTable]) -> None:
        self._capacity = np.array([table.capacity_rps for table in tables])
        self._flows = np.array([table.flows for table in tables])

    def capacity_rps(self, which: Ints, clock_frac: Floats) -> Floats:
        """Highest rate of instances of configuration ``which`` at these clocks."""
        level, part = _between(clock_frac)
        low, high = self._capacity[which, level], self._capacity[which, level + 1]
        capacity: Floats = low + part * (high - low)
        return capacity

    def at(self, which: Ints, rate_rps: Floats, clock_frac: Floats) -> Flow:
        """Flows at these rates, which are served up to capacity."""
        level, part = _between(clock_frac)
        used = rate_rps / self.capacity_rps(which, clock_frac)
        place = np.clip(used, 0.0, 1.0) * (_FLOWS - 1)
        left = np.minimum(place.astype(np.int64), _FLOWS - 2)
        along = (place - left)[:, None]
        flows, part = self._flows, part[:, None]
        low = flows[which, level, left]
        low = low + along * (flows[which, level, left + 1] - low)
        high = flows[which, level + 1, left]
        high = high + along * (flows[which, level + 1, left + 1] - high)
        return Flow(*(low + part * (high - low)).T)


def _between(clock_frac: Floats) -> tuple[Ints, Floats]:
    step = CLOCKS[1] - CLOCKS[0]
    place = np.clip((clock_frac - CLOCKS[0]) / step, 0.0, len(CLOCKS) - 1.0)
    level = np.minimum(place.astype(np.int64), len(CLOCKS) - 2)
    return level, place - level
