"""Emulated servers: engines on a bank of emulated GPUs, joined so that the loop is closed.

A `ServerBank` holds the GPUs and engines of one or many nodes. Its `tick` is where both sides meet:
what the engines did since the last tick is the GPUs' activity; the clocks that follow from power
and heat are what the engines run at until the next.

Each node gets a `NodeServing` (its engines) and a `NodeGpus` (its GPUs as columns), which answer
the node daemon's seams. `NodeGpus` gives the same values as asking for each GPU through NVML's
names (tests/daemons), without a call per GPU: it serves virtual fleets.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np

from emulators.engine import Engine, Event
from emulators.farm import Farm
from emulators.gpu import GpuBank
from emulators.models import ModelCard, load_model
from emulators.profiles import GpuProfile
from emulators.state import GpuState
from emulators.timing import IterationCost
from testbed.core.errors import DeviceError, SpecError
from testbed.core.messages import (
    GpuInfo,
    GpuReadings,
    InstanceConfig,
    InstanceReadings,
    Request,
)
from testbed.core.view import Floats


class _Roster:
    """All engines of a bank in one list, and which of them have anything to do.

    A tick asks only those, so that idle instances cost nothing but their GPUs' share of an array.
    """

    def __init__(self) -> None:
        self.stale = True
        """Engines came or went since `refresh`."""
        self.engines: list[Engine] = []
        self.owners: list[tuple[NodeServing, int]] = []
        """Node and index there of each engine."""
        self.awake: set[int] = set()
        self.engine_of = np.zeros(0, np.int64)
        """Engine of each GPU; where none runs, one past the last."""

    def refresh(self, servings: Sequence[NodeServing], num_gpus: int) -> None:
        """Bring the lists up to date; everybody is awake until a tick has looked."""
        self.stale = False
        self.engines.clear()
        self.owners.clear()
        members: list[list[int]] = []
        for serving in servings:
            serving.first = len(self.engines)
            self.engines += serving.engines
            self.owners += [(serving, local) for local in range(len(serving.engines))]
            members += serving.gpu_lists
        self.awake.update(range(len(self.engines)))
        self.engine_of = np.full(num_gpus, len(self.engines))
        for index, gpus in enumerate(members):
            self.engine_of[gpus] = index


class NodeServing:
    """The engines of one node; answers `daemons.seams.Serving`."""

    def __init__(
        self,
        bank: GpuBank,
        first_gpu: int,
        num_gpus: int,
        roster: _Roster,
        keep_segments: bool = False,
    ) -> None:
        self._bank = bank
        self._roster = roster
        self._keep_segments = keep_segments
        self.first = 0
        """Index of the first engine among those of all nodes."""
        self._first_gpu = first_gpu
        self._num_gpus = num_gpus
        self.engines: list[Engine] = []
        self.gpu_lists: list[list[int]] = []
        """Indices into the bank of each engine's GPUs."""
        self.wakes_s: list[float] = []
        """When each engine's state changes next."""
        self.dead: set[int] = set()
        """Engines that ended because a GPU of theirs is lost."""
        self.preprocess_slowdown = 1.0

    def configure(self, instances: list[InstanceConfig], t_s: float) -> None:
        """Load these models at once. Cold starts are a policy's business, not a run's beginning.

        Raises:
            DeviceError: a model is unknown, does not fit, or wants GPUs that are not there.
        """
        for instance in instances:
            try:
                model = load_model(instance.model)
                engine = build_engine(self._bank, model, instance, self._keep_segments)
            except (SpecError, ValueError) as error:
                raise DeviceError(f"instance {instance.name}: {error}") from None
            if not all(0 <= gpu < self._num_gpus for gpu in instance.gpus):
                raise DeviceError(
                    f"instance {instance.name}: GPUs {instance.gpus}, the node has {self._num_gpus}"
                )
            engine.advance_to(t_s)
            self.engines.append(engine)
            self.wakes_s.append(engine.next_event_s)
            members = [self._first_gpu + gpu for gpu in instance.gpus]
            self.gpu_lists.append(members)
            total = self._bank.profile.memory_bytes
            ballast = instance.engine.ballast_bytes
            used = int((total - ballast) * instance.engine.gpu_memory_frac) + ballast
            for gpu in members:
                self._bank.load(gpu, pid=os.getpid(), used_bytes=used)
        self._roster.stale = True

    def submit(self, instance: int, request: Request, t_s: float) -> None:
        """Give a request to an instance; one that has ended takes nothing in."""
        if instance in self.dead:
            return
        engine = self.engines[instance]
        engine.preprocess_slowdown = self.preprocess_slowdown
        engine.submit(request, max(t_s, engine.now_s))
        self._roster.awake.add(self.first + instance)
        self.wakes_s[instance] = engine.next_event_s

    def end_on(self, lost: set[int], t_s: float) -> None:
        """Engines on these GPUs of the bank crash, as a server does whose GPU is lost."""
        for index, members in enumerate(self.gpu_lists):
            if index not in self.dead and not lost.isdisjoint(members):
                self.dead.add(index)
                self.engines[index].evict(t_s)
                self.wakes_s[index] = math.inf

    def advance_to(self, t_s: float) -> None:
        """Let happen what is due by ``t_s``."""
        wakes_s = self.wakes_s
        for index, wake_s in enumerate(wakes_s):
            if wake_s <= t_s:
                engine = self.engines[index]
                engine.advance_to(t_s)
                wakes_s[index] = engine.next_event_s

    @property
    def next_event_s(self) -> float:
        """When the next block of iterations of any engine ends; infinite when idle."""
        return min(self.wakes_s, default=math.inf)

    def drain_events(self) -> list[Event]:
        """What happened since the last call."""
        events: list[Event] = []
        for engine in self.engines:
            if engine.events:
                events += engine.events
                engine.events.clear()
        return events

    def drain_gaps(self) -> list[tuple[int, int, int]]:
        """Inter-token gaps since the last call: (instance, histogram bin, count)."""
        return gaps_of(self.engines)

    def read(self, t_s: float) -> InstanceReadings:
        """Queue, batch and KV use of each engine."""
        return readings_of(self.engines, t_s)

    def close(self) -> None:
        """Unload the models."""
        for members in self.gpu_lists:
            for gpu in members:
                self._bank.unload(gpu)


def readings_of(engines: Sequence[Engine], t_s: float) -> InstanceReadings:
    """Queue, batch and KV use of engines, in columns."""
    return InstanceReadings(
        num_running=[engine.num_running for engine in engines],
        num_waiting=[engine.num_waiting for engine in engines],
        kv_used_frac=[engine.kv_used_blocks(t_s) / engine.kv_blocks for engine in engines],
        prompt_tokens_total=[engine.prompt_tokens_total for engine in engines],
        output_tokens_total=[engine.output_tokens_total(t_s) for engine in engines],
        preemptions_total=[engine.preemptions_total for engine in engines],
    )


def gaps_of(engines: Sequence[Engine]) -> list[tuple[int, int, int]]:
    """Inter-token gaps of engines since the last call: (instance, histogram bin, count)."""
    return [
        (index, place, count)
        for index, engine in enumerate(engines)
        for place, count in sorted(engine.itl.drain().items())
    ]


@cache
def _cost(model: ModelCard, gpu: GpuProfile, tp: int) -> IterationCost:
    """One for all instances alike: its tables are the largest part of an engine."""
    return IterationCost(model, gpu, tp=tp)


def build_engine(
    bank: GpuBank, model: ModelCard, instance: InstanceConfig, keep_segments: bool = False
) -> Engine:
    """An engine for this model on the bank's kind of GPU.

    Raises:
        ValueError: the model does not fit into the memory of ``tp`` GPUs.
    """
    config = instance.engine
    cost = _cost(model, bank.profile, instance.tp)
    blocks = config.kv_blocks or cost.kv_blocks(
        config.gpu_memory_frac,
        config.block_size_tokens,
        ballast_bytes=config.ballast_bytes,
    )
    if blocks < 1:
        raise ValueError(
            f"{model.name} leaves no memory for KV blocks on {instance.tp} x {bank.profile.name} "
            f"at gpu_memory_frac = {config.gpu_memory_frac}"
            + (f" beside a ballast of {config.ballast_bytes} bytes" if config.ballast_bytes else "")
        )
    return Engine(
        cost,
        config,
        kv_blocks=blocks,
        tokens_per_tile=model.tokens_per_tile,
        image_in_prompt=model.image_in_prompt,
        preprocess_s=cost.preprocess_s(),
        keep_segments=keep_segments,
    )


def gpu_columns(state: GpuState) -> dict[str, Any]:
    """All readings of these GPUs, one array each by `GpuReadings`' names, rounded as NVML does."""
    measured, control = state.measured, state.control
    columns: dict[str, Any] = {
        "power_instant_w": measured["power_instant_mw"] / 1000,
        "power_avg_w": measured["power_average_mw"] / 1000,
        "power_limit_w": control["power_limit_mw"] / 1000,
        "power_limit_enforced_w": state.enforced_mw() / 1000,
        "energy_j": measured["energy_mj"] / 1000,
        "sm_clock_mhz": measured["sm_clock_mhz"].astype(float),
        "temp_c": measured["temp_c"].astype(float),
        "mem_temp_c": measured["mem_temp_c"].astype(float),
        "gpu_busy_frac": measured["gpu_util_pct"] / 100,
        # As NVML counts: what the driver keeps for itself is in use too.
        "fb_used_bytes": measured["memory_used_bytes"] + measured["memory_reserved_bytes"],
        "throttle": measured["throttle"].copy(),
        "lost": measured["lost"] != 0,
    }
    lost = columns["lost"]
    if lost.any():
        for name, column in columns.items():
            if name not in ("energy_j", "lost"):
                column[lost] = 0
    return columns


class NodeGpus:
    """The GPUs of one node as columns of the bank; answers `daemons.seams.GpuDevice`."""

    def __init__(self, state: GpuState, first_gpu: int, num_gpus: int) -> None:
        self._state = state.slice(first_gpu, first_gpu + num_gpus)
        measured = self._state.measured
        self._infos = [
            GpuInfo(
                uuid=row["uuid"].decode(),
                model=row["name"].decode(),
                memory_total_bytes=int(row["memory_total_bytes"]),
                power_limit_min_w=int(row["power_limit_min_mw"]) / 1000,
                power_limit_max_w=int(row["power_limit_max_mw"]) / 1000,
                power_limit_default_w=int(row["power_limit_default_mw"]) / 1000,
                sm_clock_min_mhz=float(row["sm_clock_min_mhz"]),
                sm_clock_max_mhz=float(row["sm_clock_max_mhz"]),
            )
            for row in measured
        ]

    def infos(self) -> list[GpuInfo]:
        """What does not change."""
        return self._infos

    def read(self) -> GpuReadings:
        """All readings now, rounded as NVML rounds them."""
        columns = gpu_columns(self._state)
        return GpuReadings(**{name: column.tolist() for name, column in columns.items()})

    def power_limits_w(self) -> list[float]:
        """The limits asked for last."""
        limits: list[float] = (self._state.control["power_limit_mw"] / 1000).tolist()
        return limits

    def set_power_limit(self, index: int, power_limit_w: float) -> None:
        """Ask for a limit."""
        info = self._infos[index]
        if not info.power_limit_min_w <= power_limit_w <= info.power_limit_max_w:
            raise DeviceError(
                f"power limit {power_limit_w} W is outside [{info.power_limit_min_w}, "
                f"{info.power_limit_max_w}] W of {info.model}"
            )
        self._state.control["power_limit_mw"][index] = round(power_limit_w * 1000)

    def set_clock_lock(self, index: int, sm_clock_mhz: float) -> None:
        """Keep the SM clock at or below a value; 0 unlocks."""
        low_mhz = self._infos[index].sm_clock_min_mhz if sm_clock_mhz > 0 else 0
        self._state.control["sm_clock_lock_min_mhz"][index] = round(low_mhz)
        self._state.control["sm_clock_lock_max_mhz"][index] = round(max(0.0, sm_clock_mhz))

    def close(self) -> None:
        """Nothing to let go of."""


class ServerBank:
    """Engines and GPUs of one or many nodes, ticked together.

    Args:
        bank: all the GPUs, ``gpus_per_node`` for each node in order.
        num_nodes: how many nodes share it.
        faults: when which GPU of the bank is lost, seconds.
        keep_segments: have engines keep what `drain_segments` gives.
    """

    def __init__(
        self,
        bank: GpuBank,
        num_nodes: int,
        *,
        faults: Sequence[tuple[float, int]] = (),
        keep_segments: bool = False,
    ) -> None:
        if bank.count % num_nodes:
            raise ValueError(f"{bank.count} GPUs do not divide into {num_nodes} nodes")
        self.bank = bank
        self._roster = _Roster()
        per_node = bank.count // num_nodes
        self.serving = [
            NodeServing(bank, node * per_node, per_node, self._roster, keep_segments)
            for node in range(num_nodes)
        ]
        self.gpus = [NodeGpus(bank.state, node * per_node, per_node) for node in range(num_nodes)]
        self._farm: Farm | None = None
        self._totals = np.zeros((3, 1))
        self._asked: list[int] = []
        self._readings: dict[str, Any] = {}
        self._t_s = 0.0
        self._faults = sorted(faults)
        self._lost: set[int] = set()

    def farm(self) -> Farm:
        """The engines of all nodes on one heap, in the order of the nodes.

        From now on they are driven through it, and no longer through their nodes.
        """
        if self._farm is None:
            self._refresh()
            self._farm = Farm(self._roster.engines, self._roster.awake)
            for serving in self.serving:
                serving.wakes_s[:] = [math.inf] * len(serving.wakes_s)
        return self._farm

    def submit(self, index: int, request: Request, t_s: float) -> list[Event]:
        """Give a request to an engine of the `farm`; returns what came of it at once."""
        serving, local = self._roster.owners[index]
        if local in serving.dead:
            return []
        self._roster.engines[index].preprocess_slowdown = serving.preprocess_slowdown
        return self.farm().submit(index, request, t_s)

    def _refresh(self) -> None:
        roster = self._roster
        if not roster.stale:
            return
        # What engines that stay have done so far is kept, so that it is not counted again.
        before = {id(engine): self._totals[:, k] for k, engine in enumerate(roster.engines)}
        roster.refresh(self.serving, self.bank.count)
        count = len(roster.engines)
        self._totals = np.zeros((3, count + 1))
        for index, engine in enumerate(roster.engines):
            if id(engine) in before:
                self._totals[:, index] = before[id(engine)]
        self._clock_frac = np.array([engine.clock_frac for engine in roster.engines])
        self._readings = {
            "num_running": np.zeros(count, np.int64),
            "num_waiting": np.zeros(count, np.int64),
            "kv_used_frac": np.zeros(count),
            "prompt_tokens_total": np.zeros(count, np.int64),
            "output_tokens_total": np.zeros(count, np.int64),
            "preemptions_total": np.zeros(count, np.int64),
        }

    def _break(self, t_s: float) -> None:
        """Lose GPUs whose time has come, and end what ran on lost ones, whoever lost them."""
        while self._faults and self._faults[0][0] <= t_s:
            self.bank.lose(self._faults.pop(0)[1])
        lost = self.bank.state.measured["lost"]
        if np.count_nonzero(lost) > len(self._lost):
            self._lost = set(np.flatnonzero(lost).tolist())
            for serving in self.serving:
                serving.end_on(self._lost, t_s)

    def tick(self, t_s: float) -> None:
        """Advance engines and GPUs to ``t_s`` and let each set the other's pace."""
        dt_s = t_s - self._t_s
        if dt_s <= 0:
            return
        self._t_s = t_s
        self._refresh()
        self._break(t_s)
        bank, profile, roster = self.bank, self.bank.profile, self._roster
        done = self._work(t_s)
        busy_s, flops, hbm_bytes = (done - self._totals)[:, roster.engine_of]
        self._totals = done
        bank.advance(
            dt_s,
            np.minimum(busy_s / dt_s, 1.0),
            flops / (dt_s * profile.peak_flops),
            hbm_bytes / (dt_s * profile.hbm_bytes_per_s),
        )
        # An engine runs at the clock of its slowest GPU.
        clock_frac = np.ones(len(roster.engines) + 1)
        np.minimum.at(clock_frac, roster.engine_of, bank.clock_frac)
        clock_frac = clock_frac[:-1]
        for index in np.flatnonzero(clock_frac != self._clock_frac).tolist():
            roster.engines[index].set_clock(float(clock_frac[index]), t_s)
            roster.awake.add(index)
        self._clock_frac = clock_frac
        self._rearm()

    def _work(self, t_s: float) -> Floats:
        """Busy seconds, FLOPs and bytes of every engine since its start, as (3, engine + 1)."""
        engines = self._roster.engines
        self._asked = asked = sorted(self._roster.awake)
        rows = []
        for index in asked:
            engine = engines[index]
            if engine.next_event_s <= t_s:
                engine.advance_to(t_s)
            encode_s, prefill_s, decode_s, flops, hbm_bytes = engine.activity(t_s)
            rows.append((encode_s + prefill_s + decode_s, flops, hbm_bytes))
        done = self._totals.copy()
        if asked:
            done[:, asked] = np.array(rows).T
        return done

    def _rearm(self) -> None:
        """Note when engines that did something wake next; who has nothing to do, sleeps."""
        roster, farm = self._roster, self._farm
        for index in list(roster.awake):
            wake_s = roster.engines[index].next_event_s
            if farm is not None:
                farm.rearm(index)
            else:
                serving, local = roster.owners[index]
                serving.wakes_s[local] = wake_s
            if wake_s == math.inf:
                roster.awake.discard(index)

    def events(self) -> Iterator[tuple[int, list[Event]]]:
        """What the last tick brought about by itself, by engine; what is told is forgotten."""
        for index in self._asked:
            engine = self._roster.engines[index]
            if engine.events:
                events, engine.events = engine.events, []
                yield index, events

    def read_gpus(self) -> dict[str, Any]:
        """Readings of all GPUs, see `gpu_columns`."""
        return gpu_columns(self.bank.state)

    def read_instances(self, t_s: float) -> dict[str, Any]:
        """Readings of all engines by `InstanceReadings`' names, at the time of the last tick."""
        asked = self._asked
        if asked:
            engines = [self._roster.engines[index] for index in asked]
            for name, values in msgspec.structs.asdict(readings_of(engines, t_s)).items():
                self._readings[name][asked] = values
        return self._readings

    def drain_gaps(self) -> list[tuple[int, int, int]]:
        """Inter-token gaps since the last call: (engine, histogram bin, count)."""
        return gaps_of(self._roster.engines)

    def drain_segments(self) -> list[tuple[Any, ...]]:
        """Blocks of iterations that have ended since the last call: the engine, then `Segment`."""
        rows: list[tuple[Any, ...]] = []
        for index, engine in enumerate(self._roster.engines):
            if engine.segments:
                rows += [(index, *segment) for segment in engine.segments]
                engine.segments.clear()
        return rows
