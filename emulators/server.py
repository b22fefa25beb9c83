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
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from emulators.elastic import Elastic
from emulators.engine import Engine, Event
from emulators.farm import Farm, readings_at, work_at
from emulators.gpu import GpuBank
from emulators.models import ModelCard, load_model, precision_of
from emulators.native import EngineKernel, bank_library, read_gpus
from emulators.opaque import opaque_activity
from emulators.profiles import GpuProfile
from emulators.state import GpuState
from emulators.timing import IterationCost, Precision
from testbed.core.errors import DeviceError, SpecError
from testbed.core.freeze import put_back
from testbed.core.messages import (
    GpuInfo,
    GpuReadings,
    InstanceConfig,
    InstanceReadings,
    NodeConfig,
    Request,
    ReturnedWhy,
    SlotReadings,
    StartHow,
    Surroundings,
    TuneKind,
)
from testbed.core.view import Bools, Floats, Ints


class GivenUp(NamedTuple):
    """A request that an instance gave up before it ended, see `testbed.core.messages.Returned`."""

    request_id: int
    instance: int
    output_tokens: int
    why: ReturnedWhy


NO_SLOTS = SlotReadings(0, [], [], [])


class _Roster:
    """All engines of a bank in one list, and which of them have anything to do.

    A tick asks only those, so that idle instances cost nothing but their GPUs' share of an array.
    """

    def __init__(self) -> None:
        self.stale = True
        """Engines came or went since `refresh`."""
        self.engines: list[Engine] = []
        self.owners: list[tuple[NodeServing, int]] = []
        """Node and place there of each engine."""
        self.awake: set[int] = set()
        self.farm: Farm | None = None
        """Drives the engines, if they are not driven by their nodes."""
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
            self.owners += [(serving, place) for place in range(len(serving.engines))]
            members += serving.gpu_lists
        self.awake.clear()
        self.awake.update(range(len(self.engines)))
        self.engine_of = np.full(num_gpus, len(self.engines))
        for index, gpus in enumerate(members):
            self.engine_of[gpus] = index

    def rearm(self, index: int, engine: Engine) -> float:
        """Something has happened to an engine; when its node is to wake it, if ever."""
        self.awake.add(index)
        if self.farm is None:
            return engine.next_event_s
        self.farm.rearm(index)
        return math.inf


class NodeServing:
    """The engines of one node; answers `daemons.seams.Serving`.

    Engines are listed densely; `numbers` says by which instance number the coordinator knows each.
    The two agree but on nodes that are elastic, where engines come and go (`emulators.elastic`).
    """

    WIRED = (
        "first", "engines", "on_removed", "_bank", "_roster", "_keep_segments", "_first_gpu",
        "_num_gpus",
    )  # fmt: skip

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
        self.numbers: list[int] = []
        """Instance number of each engine."""
        self.gpu_lists: list[list[int]] = []
        """Indices into the bank of each engine's GPUs."""
        self.wakes_s: list[float] = []
        """When each engine's state changes next."""
        self.dead: set[int] = set()
        """Instances that ended because a GPU of theirs is lost."""
        self.preprocess_slowdown = 1.0
        self.on_removed: Callable[[Engine, list[int], float], None] = lambda engine, gpus, t_s: None
        """Told of an engine that leaves, and the GPUs it leaves, when its work is still counted."""
        self._place: dict[int, int] = {}
        self._elastic: Elastic | None = None
        self._events: list[Event] = []
        self._gaps: list[tuple[int, int, int]] = []
        self._returned: list[GivenUp] = []

    def configure(self, instances: list[InstanceConfig], t_s: float) -> None:
        """Load these models at once. Cold starts are a policy's business, not a run's beginning.

        Raises:
            DeviceError: a model is unknown, does not fit, or wants GPUs that are not there.
        """
        for number, instance in enumerate(instances):
            self.load(instance)
            self.add(number, instance, t_s)

    def configure_slots(self, config: NodeConfig, t_s: float) -> None:
        """As `configure`, where instances may change: an instance's number is its first GPU."""
        self._elastic = Elastic(self, self._bank, self._first_gpu, self._num_gpus, config, t_s)

    def arrange(
        self,
        sequence: int,
        instances: list[InstanceConfig],
        how: StartHow,
        t_s: float,
    ) -> None:
        """Hold these instances and no others, see `emulators.elastic`."""
        if self._elastic is None:
            raise DeviceError("this node's instances are fixed: the run is not elastic")
        self.advance_to(t_s)
        self._elastic.arrange(sequence, instances, how, t_s)

    # Engines, one by one.

    def load(self, instance: InstanceConfig) -> None:
        """Take the GPUs' memory that an instance will use.

        Raises:
            DeviceError: the GPUs are not there, or are taken.
        """
        if not all(0 <= gpu < self._num_gpus for gpu in instance.gpus):
            raise DeviceError(
                f"instance {instance.name}: GPUs {instance.gpus}, the node has {self._num_gpus}"
            )
        total = self._bank.profile.memory_bytes
        ballast = instance.engine.ballast_bytes
        used = int((total - ballast) * instance.engine.gpu_memory_frac) + ballast
        for gpu in instance.gpus:
            try:
                self._bank.load(self._first_gpu + gpu, pid=os.getpid(), used_bytes=used)
            except ValueError as error:
                raise DeviceError(f"instance {instance.name}: {error}") from None

    def add(self, number: int, instance: InstanceConfig, t_s: float) -> None:
        """An instance begins to serve.

        Raises:
            DeviceError: its model is unknown or does not fit.
        """
        try:
            engine = build_engine(
                self._bank, load_model(instance.model), instance, self._keep_segments
            )
        except (SpecError, ValueError) as error:
            raise DeviceError(f"instance {instance.name}: {error}") from None
        engine.advance_to(t_s)
        self._place[number] = len(self.engines)
        self.engines.append(engine)
        self.numbers.append(number)
        self.wakes_s.append(engine.next_event_s)
        self.gpu_lists.append([self._first_gpu + gpu for gpu in instance.gpus])
        self._roster.stale = True

    def remove(self, number: int, why: ReturnedWhy, t_s: float) -> Engine:
        """An instance ends: what it had is handed back, what it did stays counted."""
        place = self._place.pop(number)
        engine, members = self.engines.pop(place), self.gpu_lists.pop(place)
        self.numbers.pop(place)
        self.wakes_s.pop(place)
        self._roster.stale = True
        self._place = {each: index for index, each in enumerate(self.numbers)}
        engine.advance_to(t_s)
        if number not in self.dead:  # what a lost GPU had, the coordinator has sent elsewhere
            left = engine.progress(t_s)
            self._returned += [GivenUp(request, number, tokens, why) for request, tokens in left]
        self.dead.discard(number)
        engine.evict(t_s)
        self._events += engine.events
        engine.events.clear()
        self._gaps += [(number, bin_, count) for _, bin_, count in gaps_of([engine])]
        self.on_removed(engine, members, t_s)
        return engine

    def engine(self, number: int) -> Engine:
        """The engine of an instance."""
        return self.engines[self._place[number]]

    def resumed(self) -> None:
        """Make the engines of slots that were held; `ServerBank.restore` gives them their state."""
        if self._elastic is None:
            return
        held = [self._elastic.config(number) for number in self.numbers]
        self.engines[:] = [
            build_engine(self._bank, load_model(config.model), config, self._keep_segments)
            for config in held
        ]
        self._roster.stale = True

    # What the daemon asks.

    def submit(self, instance: int, request: Request, t_s: float, ttft_s: float = math.inf) -> None:
        """Give a request to an instance; one whose GPU is lost takes nothing in."""
        if instance in self.dead:
            return
        place = self._place.get(instance)
        if place is None:  # it left, or is not ready: the request met the news of it on the way
            self._returned.append(GivenUp(request.id, instance, 0, "gone"))
            return
        engine = self.engines[place]
        engine.preprocess_slowdown = self.preprocess_slowdown
        engine.submit(request, max(t_s, engine.now_s), ttft_s)
        self.wakes_s[place] = self._roster.rearm(self.first + place, engine)

    def tune(self, kind: TuneKind, instances: list[int], values: list[float], t_s: float) -> None:
        """A quick change to some instances, see `testbed.core.messages.Tune`."""
        for instance, value in zip(instances, values, strict=True):
            self.tune_one(instance, kind, value, t_s)

    def tune_one(self, instance: int, kind: TuneKind, value: float, t_s: float) -> None:
        """The same to one instance."""
        place = self._place.get(instance)
        if place is not None and instance not in self.dead:
            engine = self.engines[place]
            self._returned += tune_engine(engine, instance, kind, value, t_s)
            self.wakes_s[place] = self._roster.rearm(self.first + place, engine)
        elif self._elastic is not None:
            self._elastic.tune_later(instance, kind, value)

    def end_on(self, lost: set[int], t_s: float) -> None:
        """Engines on these GPUs of the bank crash, as a server does whose GPU is lost."""
        for place, members in enumerate(self.gpu_lists):
            number = self.numbers[place]
            if number not in self.dead and not lost.isdisjoint(members):
                self.dead.add(number)
                self.engines[place].evict(t_s)
                self.wakes_s[place] = math.inf

    def advance_to(self, t_s: float) -> None:
        """Let happen what is due by ``t_s``."""
        wakes_s = self.wakes_s
        for index, wake_s in enumerate(wakes_s):
            if wake_s <= t_s:
                engine = self.engines[index]
                engine.advance_to(t_s)
                wakes_s[index] = engine.next_event_s
        if self._elastic is not None:
            self._elastic.advance_to(t_s)

    @property
    def next_event_s(self) -> float:
        """When the next block of iterations of any engine ends; infinite when idle."""
        next_s = min(self.wakes_s, default=math.inf)
        return next_s if self._elastic is None else min(next_s, self._elastic.next_event_s)

    def drain_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        for engine in self.engines:
            if engine.events:
                events += engine.events
                engine.events.clear()
        return events

    def drain_returned(self) -> list[GivenUp]:
        """Requests given up since the last call."""
        returned, self._returned = self._returned, []
        return returned

    def drain_gaps(self) -> list[tuple[int, int, int]]:
        """Inter-token gaps since the last call: (instance, histogram bin, count)."""
        gaps, self._gaps = self._gaps, []
        numbers = self.numbers
        return gaps + [(numbers[place], bin_, n) for place, bin_, n in gaps_of(self.engines)]

    def read(self, t_s: float) -> InstanceReadings:
        """Queue, batch and KV use of each instance."""
        readings = readings_of(self.engines, t_s)
        return readings if self._elastic is None else self._elastic.by_slot(readings)

    def slots(self) -> SlotReadings:
        """What each slot holds; empty where instances are fixed."""
        return NO_SLOTS if self._elastic is None else self._elastic.slots()

    def close(self) -> None:
        """Unload the models."""
        for gpu in range(self._first_gpu, self._first_gpu + self._num_gpus):
            self._bank.unload(gpu)


def tune_engine(
    engine: Engine, instance: int, kind: TuneKind, value: float, t_s: float
) -> list[GivenUp]:
    """Do what `Tune` says to one engine; returns the requests that it gave up for it."""
    t_s = max(t_s, engine.now_s)
    if kind == "batch":
        engine.set_batch(int(value), t_s)
    elif kind == "order":
        engine.order(bool(value), t_s)
    elif kind == "recall":
        return [GivenUp(request, instance, n, "recalled") for request, n in engine.withdraw(t_s)]
    else:
        late = engine.withdraw(t_s, late_frac=value)
        return [GivenUp(request, instance, n, "squashed") for request, n in late]
    return []


_READINGS = "".join(
    {"i": "q", "f": "d"}[InstanceReadings.layout[name].kind] for name in InstanceReadings.names
)
"""A record of `InstanceReadings`, as `struct` writes it."""


@cache
def _packer(record: str, count: int) -> struct.Struct:
    """Packs records, in a tenth of the time that NumPy takes for a list of tuples."""
    return struct.Struct("<" + record * count)


def readings_of(engines: Sequence[Engine], t_s: float) -> InstanceReadings:
    """Queue, batch and KV use of engines, in columns."""
    packed = _packer(_READINGS, len(engines)).pack(*readings_at(engines, t_s))
    return InstanceReadings.unpack(packed)


def gaps_of(engines: Sequence[Engine]) -> list[tuple[int, int, int]]:
    """Inter-token gaps of engines since the last call: (instance, histogram bin, count)."""
    return [
        (index, place, count)
        for index, engine in enumerate(engines)
        for place, count in sorted(engine.itl.drain().items())
    ]


@cache
def _cost(model: ModelCard, gpu: GpuProfile, tp: int, precision: Precision | None) -> IterationCost:
    """One for all instances alike: its tables are the largest part of an engine."""
    return IterationCost(model, gpu, tp=tp, precision=precision)


def cost_of(gpu: GpuProfile, model: ModelCard, instance: InstanceConfig) -> IterationCost:
    """Time and work of an instance's iterations on this kind of GPU."""
    named = precision_of(model, instance.precision)
    own = named == precision_of(model, "native")
    precision: Precision | None = None if own else named  # type: ignore[assignment]
    return _cost(model, gpu, instance.tp, precision)


def kv_blocks_of(gpu: GpuProfile, model: ModelCard, instance: InstanceConfig) -> int:
    """KV blocks of an instance.

    Raises:
        ValueError: the model does not fit into the memory of ``tp`` GPUs.
    """
    config = instance.engine
    blocks = config.kv_blocks or cost_of(gpu, model, instance).kv_blocks(
        config.gpu_memory_frac,
        config.block_size_tokens,
        ballast_bytes=config.ballast_bytes,
    )
    if blocks < 1:
        raise ValueError(
            f"{model.name} leaves no memory for KV blocks on {instance.tp} x {gpu.name} "
            f"at gpu_memory_frac = {config.gpu_memory_frac}"
            + (f" beside a ballast of {config.ballast_bytes} bytes" if config.ballast_bytes else "")
        )
    return blocks


def build_engine(
    bank: GpuBank, model: ModelCard, instance: InstanceConfig, keep_segments: bool = False
) -> Engine:
    """An engine for this model on the bank's kind of GPU.

    Raises:
        ValueError: the model does not fit into the memory of ``tp`` GPUs.
    """
    cost = cost_of(bank.profile, model, instance)
    return Engine(
        cost,
        instance.engine,
        kv_blocks=kv_blocks_of(bank.profile, model, instance),
        tokens_per_tile=model.tokens_per_tile,
        image_in_prompt=model.image_in_prompt,
        preprocess_s=cost.preprocess_s(),
        keep_segments=keep_segments,
    )


def gpu_readings(state: GpuState) -> GpuReadings:
    """All readings of these GPUs, rounded as NVML does."""
    return read_gpus(state) or _gpu_readings(state)


def _gpu_readings(state: GpuState) -> GpuReadings:
    """`emulators.native.read_gpus` without machine code."""
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
    return GpuReadings(**columns)


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
        return gpu_readings(self._state)

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

    WIRED = ("bank", "serving", "gpus", "_roster", "_kernel")

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
        for serving in self.serving:
            serving.on_removed = self._leave
        self._totals = np.zeros((3, 1))
        self._left = np.zeros((3, bank.count))
        """What engines that left since the last tick had done since the one before, per GPU."""
        self._asked: list[int] = []
        self._unread: set[int] = set()
        """Engines that were asked in a tick since `read_instances`."""
        self._readings: dict[str, Any] = {}
        self._has_left = False
        self._kernel: EngineKernel | None = None
        self._opaque_frac = np.zeros(bank.count)
        self._has_opaque = False
        self._t_s = 0.0
        self._faults = sorted(faults)
        self._lost: set[int] = set()

    def farm(self) -> Farm:
        """The engines of all nodes on one heap, in the order of the nodes.

        From now on they are driven through it, and no longer through their nodes.
        """
        roster = self._roster
        if roster.farm is None:
            self._refresh()
            roster.farm = Farm(roster.engines, roster.awake)
            for serving in self.serving:
                serving.wakes_s[:] = [math.inf] * len(serving.wakes_s)
        return roster.farm

    def submit(self, index: int, request: Request, t_s: float, ttft_s: float) -> list[Event]:
        """Give a request to an engine of the `farm`; returns what came of it at once."""
        serving, place = self._roster.owners[index]
        if place in serving.dead:
            return []
        self._roster.engines[index].preprocess_slowdown = serving.preprocess_slowdown
        return self.farm().submit(index, request, t_s, ttft_s)

    def _leave(self, engine: Engine, gpus: list[int], t_s: float) -> None:
        """An engine leaves between two ticks: the next tick still counts what it did since."""
        encode_s, prefill_s, decode_s, flops, hbm_bytes = engine.activity(t_s)
        done = np.array([encode_s + prefill_s + decode_s, flops, hbm_bytes])
        for index, other in enumerate(self._roster.engines):
            if other is engine:
                done -= self._totals[:, index]
        self._left[:, gpus] += done[:, None]
        self._has_left = True

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
        self._unread.clear()  # all are awake, and asked by the next tick
        self._clock_frac = np.array([engine.clock_frac for engine in roster.engines] + [1.0])
        """Of the engines, and one past the last."""
        self._bind()
        self._readings = {
            "num_running": np.zeros(count, np.int64),
            "num_waiting": np.zeros(count, np.int64),
            "kv_used_frac": np.zeros(count),
            "prompt_tokens_total": np.zeros(count, np.int64),
            "output_tokens_total": np.zeros(count, np.int64),
            "preemptions_total": np.zeros(count, np.int64),
        }

    def _bind(self) -> None:
        """Have machine code, where there is some, work on the engines and arrays of now."""
        library, roster = bank_library(), self._roster
        if library is not None:
            self._kernel = EngineKernel(
                library, self.bank.profile, roster.engine_of, len(roster.engines),
                self.bank.clock_frac,
            )  # fmt: skip

    def surround(self, node: int, around: Surroundings) -> None:
        """What the building does to a node from now on."""
        inlet_c, dark = np.array([around.inlet_c]), np.array([around.dark])
        self.surround_nodes(np.array([node]), inlet_c, dark, np.array([around.load_frac]))

    def surround_nodes(self, nodes: Ints, inlet_c: Floats, dark: Bools, load_frac: Floats) -> None:
        """As `surround`, for many at once.

        Args:
            nodes: which.
            inlet_c: air at the inlet of each.
            dark: which of them are without power.
            load_frac: a row for each, of what opaque VMs ask of each of its GPUs.
        """
        per_node = self.bank.count // len(self.serving)
        self.bank.inlet_c.reshape(-1, per_node)[nodes] = inlet_c[:, None]
        self._opaque_frac.reshape(-1, per_node)[nodes] = load_frac
        self._has_opaque = bool(self._opaque_frac.any())
        for node in nodes[dark].tolist():
            for gpu in range(node * per_node, (node + 1) * per_node):
                if not self.bank.state.measured["lost"][gpu]:
                    self.bank.lose(gpu)

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
        bank, roster = self.bank, self._roster
        activity = self._activity(self._work(t_s), dt_s)
        if self._has_opaque:  # on GPUs of their own: opaque VMs share none with engines
            *opaque, _ = opaque_activity(bank.profile, self._opaque_frac, bank.clock_frac)
            activity = activity + np.array(opaque)
        bank.advance(dt_s, *activity)
        for index in self._paces():
            roster.engines[index].set_clock(float(self._clock_frac[index]), t_s)
            roster.awake.add(index)
        self._rearm()

    def _activity(self, done: Floats, dt_s: float) -> Floats:
        """Busy share, operations and bytes over those at peak of the GPUs since the last tick."""
        if self._kernel is not None:
            self._kernel.load(done, self._totals, self._left, dt_s)
            activity = self._kernel.work
        else:
            profile = self.bank.profile
            scale = [dt_s, dt_s * profile.peak_flops, dt_s * profile.hbm_bytes_per_s]
            since = (done - self._totals)[:, self._roster.engine_of] + self._left
            activity = since / np.array(scale)[:, None]
            np.minimum(activity[0], 1.0, out=activity[0])
        self._totals = done
        if self._has_left:
            self._left[:] = 0.0
            self._has_left = False
        return activity

    def _paces(self) -> list[int]:
        """Set each engine's clock to that of its slowest GPU; returns whose is another now."""
        if self._kernel is not None:
            return self._kernel.pace(self._clock_frac)
        clock_frac = np.ones(len(self._clock_frac))
        np.minimum.at(clock_frac, self._roster.engine_of, self.bank.clock_frac)
        clock_frac[-1] = self._clock_frac[-1]
        changed: list[int] = np.flatnonzero(clock_frac != self._clock_frac).tolist()
        self._clock_frac = clock_frac
        return changed

    def _work(self, t_s: float) -> Floats:
        """Busy seconds, FLOPs and bytes of every engine since its start, as (3, engine + 1)."""
        self._asked = asked = sorted(self._roster.awake)
        flat = work_at(self._roster.engines, asked, t_s)
        self._unread.update(asked)
        done = self._totals.copy()
        if asked:
            now = np.frombuffer(_packer("ddd", len(asked)).pack(*flat)).reshape(-1, 3).T
            if len(asked) == len(self._roster.engines):
                done[:, :-1] = now
            else:
                done[:, asked] = now
        return done

    def _rearm(self) -> None:
        """Note when engines that did something wake next; who has nothing to do, sleeps."""
        roster = self._roster
        farm, engines, owners = roster.farm, roster.engines, roster.owners
        asleep = []
        for index in roster.awake:
            wake_s = engines[index].next_event_s
            if farm is None:
                serving, place = owners[index]
                serving.wakes_s[place] = wake_s
            else:
                farm.rearm(index)
            if wake_s == math.inf:
                asleep.append(index)
        roster.awake.difference_update(asleep)

    def events(self) -> Iterator[tuple[int, list[Event]]]:
        """What the last tick brought about by itself, by engine; what is told is forgotten."""
        for index in self._asked:
            engine = self._roster.engines[index]
            if engine.events:
                events, engine.events = engine.events, []
                yield index, events

    def save(self) -> dict[str, Any]:
        """The state of engines and GPUs; `restore` gives it to a bank made alike."""
        self._refresh()
        return {
            "servers": self,
            "bank": self.bank.save(),
            "engines": [engine.save() for engine in self._roster.engines],
            "awake": self._roster.awake,
            "nodes": self.serving,
            "farm": self._roster.farm is not None,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Be what `save` saw."""
        for serving, state in zip(self.serving, kept["nodes"], strict=True):
            put_back(serving, state)
        self._refresh()
        self.bank.restore(kept["bank"])
        for engine, state in zip(self._roster.engines, kept["engines"], strict=True):
            engine.restore(state)
        put_back(self, kept["servers"])
        self._bind()
        self._roster.awake.clear()
        self._roster.awake.update(kept["awake"])
        if kept["farm"]:
            farm = self.farm()
            for index in range(len(self._roster.engines)):
                farm.rearm(index)

    def read_gpus(self) -> GpuReadings:
        """Readings of all GPUs."""
        return gpu_readings(self.bank.state)

    def read_instances(self, t_s: float) -> dict[str, Any]:
        """Readings of all engines by `InstanceReadings`' names, at the time of the last tick."""
        changed = sorted(self._unread)
        self._unread.clear()
        if changed:
            engines = [self._roster.engines[index] for index in changed]
            read = readings_of(engines, t_s)
            for name, values in zip(read.names, read.values(), strict=True):
                self._readings[name][changed] = values
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
