"""Put recorded views through policies again and compare what they ask for.

Each control tick of the recording gives back the `View` that the policies saw, bit for bit. The
policies named in the spec (or others, to see what they would have done) are stepped on it in the
recorded order, and their proposals are compared with the recorded ones: same kind, same targets,
same values, in the same order. What they said as a reason is not compared.

How a policy is loaded is the caller's business: ``load`` makes a controller from a `PolicySpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from testbed.core.errors import RecordingError
from testbed.core.spec import PolicySpec
from testbed.core.view import (
    PRECISIONS,
    Controller,
    Facility,
    Floats,
    GpuColumns,
    InstanceColumns,
    Ints,
    RowColumns,
    TenantColumns,
    View,
    slots_to_gpus,
)
from testbed.recorder.facility import facility_of
from testbed.recorder.reader import Recording, Source
from testbed.recorder.tables import LAYOUT, VIEW_STATIC, flatten

Load = Callable[[PolicySpec], Controller]


class Proposal(NamedTuple):
    """One command for one target, as compared."""

    command: int
    kind: str
    target_index: int
    value: float


@dataclass(frozen=True, slots=True)
class Tick:
    """One control tick: what was seen, who was stepped, and what each of them asked for."""

    step: int
    view: View
    policies: list[int]
    proposals: dict[int, list[Proposal]]


@dataclass(slots=True)
class ReplayResult:
    """How the recorded commands and those of the replayed policies compare."""

    steps: int = 0
    equal: int = 0
    """Commands, counted one per target, that were said again."""
    different: int = 0
    """Commands recorded and not said again, or said now and not recorded."""
    first_difference: str = ""

    @property
    def same(self) -> bool:
        """Whether every command was reproduced."""
        return self.different == 0


def replay(
    source: Source, load: Load, policies: Sequence[PolicySpec] | None = None
) -> ReplayResult:
    """Step the policies of the spec (or ``policies``, by place) on every recorded view.

    Raises:
        RecordingError: the recording has no views, or another number of policies.
    """
    recording = Recording.open(source)
    chosen = recording.spec.policy if policies is None else list(policies)
    controllers = [load(policy) for policy in chosen]
    result = ReplayResult()
    for tick in ticks(recording):
        result.steps += 1
        for policy in tick.policies:
            if policy >= len(controllers):
                raise RecordingError(
                    f"recording {recording.folder}: policy {policy} was stepped, "
                    f"there are {len(controllers)}"
                )
            said = _proposals(controllers[policy], tick.view)
            _compare(result, tick, chosen[policy].use, tick.proposals.get(policy, []), said)
    return result


def _proposals(controller: Controller, view: View) -> list[Proposal]:
    return [
        Proposal(ordinal, flat.kind, int(target), float(value))
        for ordinal, flat in enumerate(flatten(command) for command in controller.step(view))
        for target, value in zip(flat.target, flat.value, strict=True)
    ]


def _compare(
    result: ReplayResult, tick: Tick, policy: str, recorded: list[Proposal], said: list[Proposal]
) -> None:
    equal = sum(a == b for a, b in zip(recorded, said, strict=False))
    result.equal += equal
    different = max(len(recorded), len(said)) - equal
    if different and not result.first_difference:
        place = next(
            (i for i, (a, b) in enumerate(zip(recorded, said, strict=False)) if a != b),
            min(len(recorded), len(said)),
        )
        result.first_difference = (
            f"step {tick.step} at {tick.view.now_s:g} s, policy {policy}: recorded "
            f"{_words(recorded, place)}, replayed {_words(said, place)}"
        )
    result.different += different


def _words(proposals: list[Proposal], place: int) -> str:
    if place >= len(proposals):
        return "nothing" if not proposals else "nothing more"
    one = proposals[place]
    return f"{one.kind} {one.value!r} for target {one.target_index}"


def ticks(recording: Recording) -> Iterator[Tick]:
    """Every complete control tick of a recording, in order.

    Raises:
        RecordingError: the views were not recorded.
    """
    steps = recording.columns("steps", "step", "now_s", "policy_index")
    if not len(steps["step"]):
        return
    if "view_rows" not in recording.names():
        raise RecordingError(
            f"recording {recording.folder}: no views to replay (record.views was false)"
        )
    views = _Views(recording)
    commands = _Commands(recording)
    order, starts = np.unique(steps["step"], return_index=True)
    for number, group in zip(order, np.split(steps["policy_index"], starts[1:]), strict=True):
        step = int(number)
        ran = [int(policy) for policy in group if policy >= 0]
        now_s = float(steps["now_s"][np.searchsorted(steps["step"], step)])
        yield Tick(step, views.at(step, now_s), ran, commands.at(step))


class _Views:
    """The view tables, cut into control ticks."""

    def __init__(self, recording: Recording) -> None:
        gpus = recording.columns("gpu_index")
        instances = recording.columns("instance_index")
        tenants = recording.columns("tenant_index")
        rows = recording.columns("row_index")
        pools = recording.columns("pool_index")
        instances["pool"] = instances["pool_index"]
        self._elastic = recording.spec.cluster.elastic
        self._gpus = _Columns(recording, "view_gpus", GpuColumns, gpus)
        self._instances = _Columns(recording, "view_instances", InstanceColumns, instances)
        self._tenants = _Columns(recording, "view_tenants", TenantColumns, tenants)
        self._row_names = tuple(str(name) for name in rows["name"])
        self._rows = recording.columns("view_rows", "step", "budget_w")
        self._pools = tuple(str(name) for name in pools["name"])
        self._pool_priority = pools["priority"].astype(np.int64)
        self._pool_of_class = {
            slo_class.name: self._pools.index(slo_class.pool)
            for slo_class in recording.spec.slo_class
            if slo_class.pool in self._pools
        }
        models = recording.columns("model_index")
        places = models["model"].astype(np.int64)
        self._models = tuple(dict.fromkeys(str(name) for name in models["name"]))
        self._quality_frac = np.full((len(self._models), len(PRECISIONS)), np.nan)
        columns = [PRECISIONS.index(str(name)) for name in models["precision"]]
        self._quality_frac[places, columns] = models["quality_frac"]
        self._layout = _LayoutAt(recording, instances)
        self._facility = _FacilityAt(recording) if recording.spec.plant is not None else None

    def at(self, step: int, now_s: float) -> View:
        """The view of a control tick. Its arrays are read-only, as they were."""
        gpus, instances = self._gpus.at(step), self._instances.at(step)
        for name, column in self._layout.at(step).items():
            setattr(instances, name, column)
        if self._elastic:
            gpus.instance, gpus.priority = self._spread(instances)
        facility = self._facility.at(step) if self._facility is not None else None
        if facility is not None:
            gpus.priority = np.where(
                facility.gpu_vm >= 0, self._pool_priority.max() + 1, gpus.priority
            )
        return View(
            now_s=now_s,
            rows=RowColumns(self._row_names, _cut(self._rows, step)["budget_w"]),
            gpus=gpus,
            instances=instances,
            tenants=self._tenants.at(step),
            pools=self._pools,
            pool_priority=self._pool_priority,
            pool_of_class=dict(self._pool_of_class),
            models=self._models,
            model_quality_frac=self._quality_frac,
            facility=facility,
        )

    def _spread(self, instances: InstanceColumns) -> tuple[Ints, Ints]:
        spare = int(self._pool_priority.min())
        return slots_to_gpus(instances.num_gpus, instances.pool, self._pool_priority, spare)


class _FacilityAt:
    """The table of the building, played forward to a control tick."""

    def __init__(self, recording: Recording) -> None:
        self._table = recording.columns("facility")
        self._nodes = tuple(recording.spec.node_names())
        self._now: dict[str, Floats] = {}
        self._done = 0

    def at(self, step: int) -> Facility:
        """What policies saw; steps must not go back."""
        table = self._table
        end = int(np.searchsorted(table["step"], step, side="right"))
        rows = slice(self._done, end)
        for quantity, place, value in zip(
            table["quantity"][rows], table["place_index"][rows], table["value"][rows], strict=True
        ):
            column = self._now.setdefault(str(quantity), np.zeros(0))
            if place >= len(column):  # seen for the first time, place by place
                column = self._now[str(quantity)] = np.append(column, 0.0)
            column[place] = value
        self._done = end
        return facility_of(self._now, self._nodes)


class _LayoutAt:
    """The table of layouts, played forward to a control tick."""

    def __init__(self, recording: Recording, index: dict[str, Any]) -> None:
        self._table = recording.columns("layout")
        self._table["pool"] = self._table["pool_index"]
        self._table["precision"] = np.array(
            [PRECISIONS.index(str(p)) if p else -1 for p in self._table["precision"]], np.int64
        )
        count = len(index["name"])
        self._now: dict[str, Any] = {
            name: np.zeros(count, np.float64 if name == "ready_s" else np.int64) for name in LAYOUT
        }
        # Of recordings made before there was such a table.
        self._now["pool"][:], self._now["num_gpus"][:] = index["pool"], index["num_gpus"]
        self._done = 0

    def at(self, step: int) -> dict[str, Any]:
        """Columns of the layout that policies saw; steps must not go back."""
        end = int(np.searchsorted(self._table["step"], step, side="right"))
        rows = slice(self._done, end)
        for name in LAYOUT:
            # Of several rows of one instance the last holds: NumPy assigns in order.
            self._now[name][self._table["instance"][rows]] = self._table[name][rows]
        self._done = end
        return {name: column.copy() for name, column in self._now.items()}


class _Columns:
    """One of the structs of a view, over all control ticks."""

    def __init__(
        self, recording: Recording, table: str, struct: type[Any], index: dict[str, Any]
    ) -> None:
        self._struct = struct
        self._fixed: dict[str, Any] = {"name": tuple(str(name) for name in index["name"])}
        kinds = {"Floats": np.float64, "Ints": np.int64}
        for column in fields(struct):
            if column.name in VIEW_STATIC[struct] and column.name != "name":
                # What is not in the index is in the table of layouts.
                values = index.get(column.name, np.zeros(len(index["name"])))
                self._fixed[column.name] = values.astype(kinds[str(column.type)])
        self._table = recording.columns(table)

    def at(self, step: int) -> Any:
        cut = _cut(self._table, step)
        seen = {c.name: cut[c.name] for c in fields(self._struct) if c.name not in self._fixed}
        return self._struct(**self._fixed, **seen)


def _cut(table: dict[str, Any], step: int) -> dict[str, Any]:
    """Rows of one step; the table is in order of steps."""
    start, end = np.searchsorted(table["step"], [step, step + 1])
    return {name: values[start:end] for name, values in table.items()}


class _Commands:
    """The proposals of each step, by policy."""

    def __init__(self, recording: Recording) -> None:
        table = recording.columns(
            "commands", "step", "policy_index", "command", "kind", "target_index", "value"
        )
        proposals = table["command"] >= 0  # the others are outcomes that became known later
        self._table = {name: values[proposals] for name, values in table.items()}

    def at(self, step: int) -> dict[int, list[Proposal]]:
        cut = _cut(self._table, step)
        found: dict[int, list[Proposal]] = {}
        for row in zip(
            cut["policy_index"],
            cut["command"],
            cut["kind"],
            cut["target_index"],
            cut["value"],
            strict=True,
        ):
            policy, command, kind, target, value = row
            found.setdefault(int(policy), []).append(
                Proposal(int(command), str(kind), int(target), float(value))
            )
        return found
