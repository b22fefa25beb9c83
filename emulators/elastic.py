"""Instances that come and go on one node: what `Arrange` sets in motion.

A slot is a GPU of the node; it holds the instance whose first GPU it is. An instance passes through

    starting --(ready_s)--> up --(not in the layout)--> draining --(empty, or drain_s)--> gone

and a layout that no longer has it ends it at once while it starts. A drained instance frees its
GPUs; what waits for them starts in the same moment. An instance that is draining and is in the next
layout again is simply up again.

Re-sharding takes no drain. Where the instances that leave and those that come share GPUs and all
hold the same model at the same precision, the weights are on the node already: the old instances
hand back what they had (the KV cache of moved shards is dropped, not moved) and the new ones start
after `emulators.reconfigure.reshard`. Handing back, and not pausing, since a request's KV cache is
spread over all the old shards, and because with more than one new instance somebody must choose
where each request goes: that is the router's business. See docs/decisions/0040.

While an instance starts its GPUs run no kernel: they draw idle power and that of the memory traffic
of the weights that stream in (`GpuBank.copy`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from emulators import reconfigure
from emulators.gpu import GpuBank
from emulators.models import load_model, precision_of, weight_bytes
from testbed.core.messages import (
    InstanceConfig,
    InstanceReadings,
    NodeConfig,
    ReturnedWhy,
    SlotReadings,
    StartHow,
    TuneKind,
)
from testbed.core.view import DRAINING, OFF, STARTING, UP

if TYPE_CHECKING:
    from emulators.server import NodeServing


@dataclass(slots=True)
class _Slot:
    """An instance on the node."""

    config: InstanceConfig
    state: int
    ready_s: float
    until_s: float = math.inf
    """When it starts to serve, or must have drained."""
    tunes: list[tuple[TuneKind, float]] = field(default_factory=list)
    """Quick changes that came before it was ready for them."""


class Elastic:
    """The slots of one node; see the module's story.

    Args:
        serving: the node's engines.
        bank: the GPUs.
        first_gpu: of the node, in the bank.
        num_gpus: of the node.
        config: what the coordinator says; its instances are up at once.
        t_s: now.
    """

    WIRED = ("_serving", "_bank", "_first_gpu", "_num_gpus", "_config")

    def __init__(
        self,
        serving: NodeServing,
        bank: GpuBank,
        first_gpu: int,
        num_gpus: int,
        config: NodeConfig,
        t_s: float,
    ) -> None:
        self._serving = serving
        self._bank = bank
        self._first_gpu = first_gpu
        self._num_gpus = num_gpus
        self._config = config
        self._sequence = config.layout_sequence
        self._slots: dict[int, _Slot] = {}
        self._pending: list[tuple[InstanceConfig, StartHow, bool]] = []
        # Of engines that have left: prompt and output tokens, preemptions.
        self._before = np.zeros((3, num_gpus), np.int64)
        self.next_event_s = math.inf
        self._shown: SlotReadings | None = None
        for instance in config.instances:
            serving.load(instance)
            serving.add(instance.gpus[0], instance, t_s)
            self._slots[instance.gpus[0]] = _Slot(instance, UP, max(0.0, t_s))
        self._settle()

    def arrange(
        self, sequence: int, instances: list[InstanceConfig], how: StartHow, t_s: float
    ) -> None:
        """Hold these instances and no others."""
        if sequence <= self._sequence:
            return
        self._sequence = sequence
        boots = not self._slots
        wanted = {instance.serial for instance in instances}
        held = {slot.config.serial: slot for slot in self._slots.values()}
        for slot in held.values():
            if slot.config.serial in wanted and slot.state == DRAINING:
                slot.state, slot.until_s = UP, math.inf
        new = [
            instance
            for instance in instances
            if instance.serial not in held and not self._lost(instance)
        ]
        leaving = []
        for number, slot in list(self._slots.items()):
            if slot.config.serial in wanted:
                continue
            if slot.state == STARTING or number in self._serving.dead:
                self._end(number, "gone", t_s)
            else:
                leaving.append(slot)
        new = self._reshard(leaving, new, t_s)
        for slot in leaving:
            number = slot.config.gpus[0]
            if self._slots.get(number) is slot and slot.state == UP:
                slot.state = DRAINING
                slot.until_s = t_s + self._config.delay_frac * self._config.delays.drain_s
        self._pending = [(instance, how, boots) for instance in new]
        self._settle()
        self.advance_to(t_s)

    def _reshard(
        self, leaving: list[_Slot], new: list[InstanceConfig], t_s: float
    ) -> list[InstanceConfig]:
        """Re-shard where that can be; returns the new instances that are still to be started."""
        rest: list[InstanceConfig] = []
        for olds, news in _overlapping(leaving, new):
            kinds = {_weights(config) for config in (*(slot.config for slot in olds), *news)}
            if not olds or not news or len(kinds) > 1:
                rest += news
                continue
            card = load_model(news[0].model)
            change = reconfigure.reshard(
                self._config.delays,
                weight_bytes(card, news[0].precision),
                [slot.config.gpus for slot in olds],
                [instance.gpus for instance in news],
                self._bank.profile.nvlink_bytes_per_s,
                scale=self._config.delay_frac,
            )
            for slot in olds:
                self._end(slot.config.gpus[0], "resharded", t_s)
            for instance in news:
                self._begin(instance, t_s + change.duration_s)
            for gpu, num_bytes in change.in_bytes.items():
                num_bytes += change.out_bytes[gpu]
                self._bank.copy(self._first_gpu + gpu, t_s, t_s + change.copy_s, num_bytes)
        return rest

    def advance_to(self, t_s: float) -> None:
        """Let happen what is due by ``t_s``; the engines are there already."""
        if not self._moving:
            return
        for number, slot in list(self._slots.items()):
            if slot.state == STARTING and self._lost(slot.config):
                self._end(number, "gone", t_s)
            elif slot.state == STARTING and slot.until_s <= t_s:
                self._serving.add(number, slot.config, t_s)
                slot.state, slot.ready_s, slot.until_s = UP, t_s, math.inf
                for kind, value in slot.tunes:
                    self._serving.tune_one(number, kind, value, t_s)
            elif slot.state == DRAINING:
                engine = self._serving.engine(number)
                if slot.until_s <= t_s or not (engine.num_running or engine.num_waiting):
                    self._end(number, "drained", t_s)
        waiting = []
        taken = {gpu for slot in self._slots.values() for gpu in slot.config.gpus}
        for instance, how, boots in self._pending:
            if self._lost(instance):
                continue
            if taken.isdisjoint(instance.gpus):
                self._start(instance, how, boots, t_s)
            else:
                waiting.append((instance, how, boots))
        self._pending = waiting
        self._settle()

    def tune_later(self, number: int, kind: TuneKind, value: float) -> None:
        """A quick change to an instance that does not serve yet; others have nothing to change."""
        slot = self._slots.get(number)
        if slot is not None and slot.state == STARTING and kind in ("batch", "order"):
            slot.tunes.append((kind, value))

    def _start(self, instance: InstanceConfig, how: StartHow, boots: bool, t_s: float) -> None:
        """Load an instance onto free GPUs."""
        num_bytes = weight_bytes(load_model(instance.model), instance.precision)
        start = reconfigure.start(
            self._config.delays,
            how,
            num_bytes,
            instance.tp,
            boots=boots,
            scale=self._config.delay_frac,
        )
        self._begin(instance, t_s + start.duration_s)
        for gpu in instance.gpus:
            times_s = (t_s + start.copy_from_s, t_s + start.copy_to_s)
            self._bank.copy(self._first_gpu + gpu, *times_s, num_bytes / instance.tp)

    def _lost(self, instance: InstanceConfig) -> bool:
        """Whether a GPU of an instance has fallen off the bus."""
        gpus = [self._first_gpu + gpu for gpu in instance.gpus]
        return bool(self._bank.state.measured["lost"][gpus].any())

    def _begin(self, instance: InstanceConfig, ready_s: float) -> None:
        self._serving.load(instance)
        self._slots[instance.gpus[0]] = _Slot(instance, STARTING, ready_s, ready_s)

    def _end(self, number: int, why: ReturnedWhy, t_s: float) -> None:
        """An instance is gone, and its GPUs are free."""
        slot = self._slots.pop(number)
        if slot.state != STARTING:
            engine = self._serving.remove(number, why, t_s)
            self._before[0, number] += engine.prompt_tokens_total
            self._before[1, number] += engine.output_tokens_total(t_s)
            self._before[2, number] += engine.preemptions_total
        for gpu in slot.config.gpus:
            self._bank.unload(self._first_gpu + gpu)
            self._bank.end_copies(self._first_gpu + gpu)

    def _settle(self) -> None:
        """Bring what follows from the slots up to date."""
        self._shown = None
        moving = any(slot.state != UP for slot in self._slots.values())
        self._moving = moving or bool(self._pending)
        self.next_event_s = min((slot.until_s for slot in self._slots.values()), default=math.inf)
        if self._config.empty_power_frac < 1.0:
            bank, node = self._bank, slice(self._first_gpu, self._first_gpu + self._num_gpus)
            saved_w = (1.0 - self._config.empty_power_frac) * bank.profile.idle_w
            if bank.unloaded_w is None:
                bank.unloaded_w = np.zeros(bank.count)
            bank.unloaded_w[node] = saved_w
            for slot in self._slots.values():
                bank.unloaded_w[[self._first_gpu + gpu for gpu in slot.config.gpus]] = 0.0

    def config(self, number: int) -> InstanceConfig:
        """What the instance in a slot is."""
        return self._slots[number].config

    # What the daemon reports.

    def slots(self) -> SlotReadings:
        """What each slot holds."""
        if self._shown is None:
            count = self._num_gpus
            serial, state, ready_s = [0] * count, [OFF] * count, [0.0] * count
            for number, slot in self._slots.items():
                serial[number] = slot.config.serial
                state[number], ready_s[number] = slot.state, slot.ready_s
            self._shown = SlotReadings(self._sequence, serial, state, ready_s)
        return self._shown

    def by_slot(self, readings: InstanceReadings) -> InstanceReadings:
        """Readings of engines as readings of slots; totals go on counting from one to the next."""
        slots = np.zeros(self._num_gpus, InstanceReadings.layout)
        for name, before in zip(_TOTALS, self._before, strict=True):
            slots[name] = before
        for name in InstanceReadings.names:
            np.add.at(slots[name], self._serving.numbers, readings.records[name])
        return InstanceReadings.of(slots)


_TOTALS = ("prompt_tokens_total", "output_tokens_total", "preemptions_total")


def _weights(config: InstanceConfig) -> tuple[str, str]:
    """What must be alike for a re-shard."""
    return config.model, precision_of(load_model(config.model), config.precision)


def _overlapping(
    leaving: list[_Slot], new: list[InstanceConfig]
) -> Iterator[tuple[list[_Slot], list[InstanceConfig]]]:
    """Groups of old and new instances that share GPUs, directly or through one another."""
    groups: list[tuple[set[int], list[_Slot], list[InstanceConfig]]] = []
    entries: list[tuple[set[int], list[_Slot], list[InstanceConfig]]] = [
        *((set(slot.config.gpus), [slot], []) for slot in leaving),
        *((set(instance.gpus), [], [instance]) for instance in new),
    ]
    for gpus, olds, news in entries:
        apart = []
        for group in groups:
            if group[0].isdisjoint(gpus):
                apart.append(group)
            else:
                gpus, olds, news = gpus | group[0], group[1] + olds, group[2] + news
        groups = [*apart, (gpus, olds, news)]
    for _, olds, news in groups:
        yield olds, news
