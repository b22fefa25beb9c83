"""Which instances each node is to hold: what policies said, checked, settled and spelled out.

Each policy's last `SetLayout` for a node stands until it says another or takes it back. Of several
the highest precedence holds (safety, then SLO, then efficiency), and within one the policy that the
run file lists first: two policies of equal rank that both want a node do not take turns.

An instance that is in the old layout and in the new one keeps its serial number, by which its node
knows to leave it alone. So does one that is still draining.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cache

import msgspec

from emulators.models import load_model, precision_of
from emulators.profiles import GpuProfile, load_gpu
from emulators.server import kv_blocks_of
from testbed.coordinator.arbiter import PRECEDENCE
from testbed.coordinator.cluster import Layout, Node
from testbed.core.errors import PolicyError, SpecError
from testbed.core.messages import EngineConfig, InstanceConfig, StartHow
from testbed.core.names import slot_name
from testbed.core.spec import RunSpec
from testbed.core.view import OFF, PRECISIONS, Placement, SetLayout

TPS = (1, 2, 4, 8)


class Arranging:
    """Standing layouts of all policies; see the module's story."""

    WIRED = ("_spec", "_layout", "_models", "_rank")

    def __init__(self, spec: RunSpec, layout: Layout) -> None:
        self._spec = spec
        self._layout = layout
        self._models = spec.model_names()
        self._rank = [PRECEDENCE.index(policy.precedence) for policy in spec.policy]
        self._words: dict[int, dict[int, tuple[list[InstanceConfig], StartHow]]] = {}
        self._serial: dict[int, int] = {}
        self._known: dict[int, dict[int, InstanceConfig]] = {}
        for node in layout.nodes:
            self._known[node.index] = {config.serial: config for config in node.configs}
            self._serial[node.index] = len(node.configs)

    def known(self, node: Node, serial: int) -> InstanceConfig | None:
        """The instance of a node with that serial number; None for an empty slot's."""
        return self._known[node.index].get(serial)

    # What policies say.

    def claim(self, policy: int, command: SetLayout) -> None:
        """Check a layout and let it stand.

        Raises:
            PolicyError: it cannot be, with the field, its value and what is allowed.
        """
        try:
            node, configs = self._checked(command)
        except ValueError as error:
            use = self._spec.policy[policy].use
            raise PolicyError(f"policy {use!r}: SetLayout.{error}") from None
        words = self._words.setdefault(node, {})
        if configs is None:
            words.pop(policy, None)
        else:
            words[policy] = (configs, command.how)

    def winner(self, node: int) -> int:
        """The policy whose word holds for a node; -1 if nobody has one."""
        words = self._words.get(node)
        return min(words, key=lambda policy: (self._rank[policy], policy)) if words else -1

    def settle(self, node: Node) -> bool:
        """Make the word that holds the node's layout; whether that changes anything."""
        winner = self.winner(node.index)
        if winner < 0:
            return False
        wanted, how = self._words[node.index][winner]
        present = {config.serial: config for config in node.configs}
        if node.layout_seen is not None:
            seen = node.layout_seen
            for serial, state in zip(seen.serial, seen.state, strict=True):
                config = self.known(node, serial)
                if state != OFF and config is not None:
                    present.setdefault(serial, config)
        kept = {_key(config): config for config in present.values()}
        configs = []
        for config in wanted:
            same = kept.get(_key(config))
            if same is None:
                self._serial[node.index] += 1
                config = msgspec.structs.replace(config, serial=self._serial[node.index])
            else:
                config = msgspec.structs.replace(config, serial=same.serial)
            self._known[node.index][config.serial] = config
            configs.append(config)
        if configs == node.configs:
            return False
        node.configs, node.layout_how = configs, how
        node.layout_sequence += 1
        return True

    # Checks.

    def _checked(self, command: SetLayout) -> tuple[int, list[InstanceConfig] | None]:
        if not self._spec.cluster.elastic:
            raise ValueError("node: the run's instances are fixed; it needs cluster.elastic = true")
        node = _index("node", command.node, len(self._layout.nodes))
        if command.how not in ("snapshot", "cold"):
            raise ValueError(f"how = {command.how!r} must be 'snapshot' or 'cold'")
        if command.layout is None:
            return node, None
        if not isinstance(command.layout, Iterable):
            raise ValueError(f"layout = {command.layout!r} must be a tuple of placements or None")
        configs: list[InstanceConfig] = []
        taken: dict[int, int] = {}
        for place, placement in enumerate(command.layout):
            field = f"layout[{place}]"
            if not isinstance(placement, Placement):
                raise ValueError(f"{field} = {placement!r} must be a Placement")
            config = self._config(field, node, placement)
            for gpu in config.gpus:
                if gpu in taken:
                    raise ValueError(
                        f"{field}.first_gpu = {config.gpus[0]}, tp = {config.tp}: GPU {gpu} is "
                        f"taken by layout[{taken[gpu]}]"
                    )
                taken[gpu] = place
            configs.append(config)
        return node, sorted(configs, key=lambda config: config.gpus[0])

    def _config(self, field: str, node: int, placement: Placement) -> InstanceConfig:
        per_node = self._spec.cluster.gpus_per_node
        first = _index(f"{field}.first_gpu", placement.first_gpu, per_node)
        tp = operator.index(placement.tp)
        if tp not in TPS or first + tp > per_node:
            raise ValueError(
                f"{field}.tp = {tp} must be one of {TPS} and end within the node's {per_node} "
                f"GPUs, from first_gpu = {first}"
            )
        pool = self._spec.pool[_index(f"{field}.pool", placement.pool, len(self._spec.pool))]
        model = self._models[_index(f"{field}.model", placement.model, len(self._models))]
        if placement.precision not in PRECISIONS:
            raise ValueError(
                f"{field}.precision = {placement.precision!r} must be one of {PRECISIONS}"
            )
        precision = precision_of(load_model(model), placement.precision)
        try:
            _check_fit(load_gpu(self._spec.cluster.gpu), model, precision, tp, pool.engine)
        except ValueError as error:
            raise ValueError(f"{field}.tp = {tp}: {error}") from None
        name = slot_name(self._layout.nodes[node].name, first)
        gpus = list(range(first, first + tp))
        return InstanceConfig(name, pool.name, model, tp, gpus, pool.engine, precision)


def _index(field: str, value: int, count: int) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        index = -1
    if not 0 <= index < count:
        raise ValueError(f"{field} = {value!r} must be an index below {count}")
    return index


@cache
def _check_fit(gpu: GpuProfile, model: str, precision: str, tp: int, engine: EngineConfig) -> None:
    config = InstanceConfig("", "", model, tp, list(range(tp)), engine, precision)
    try:
        kv_blocks_of(gpu, load_model(model), config)
    except SpecError as error:
        raise ValueError(str(error)) from None


def _key(config: InstanceConfig) -> tuple[object, ...]:
    """What makes two instances the same one, whatever pool it serves."""
    return (*config.gpus, config.model, config.precision, config.engine)
