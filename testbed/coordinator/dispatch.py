"""Requests on their way: routed, held while nothing is up for them, and written down at their end.

Plain and typed throughout, since most of a fleet's run is spent here: where the engine has been
compiled (`testbed.core.compiled`), so has this.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable
from operator import index
from typing import Any, ClassVar

import msgspec

from testbed.coordinator.cluster import Layout
from testbed.core.errors import PolicyError
from testbed.core.messages import Request
from testbed.core.spec import ClassSpec, RunSpec
from testbed.core.view import Router
from testbed.recorder.writer import Recorder

TOTALS_PERIOD_S = 60.0
"""How often counts of all requests are written down, where not every request is."""

Happening = tuple[int, str, float, int]
"""What became of a request on its node: its id, the kind of event, when, and preemptions so far."""


_NO_REQUEST = Request(-1, math.nan, 0, 0)


class InFlight:
    """A request on its way; one without it is for `testbed.core.freeze` to fill."""

    __slots__ = (
        "attempts", "done_tokens", "first_token_s", "first_token_seen_s", "instance",
        "prefill_due_tokens", "request", "returns", "routed_s", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request = _NO_REQUEST, tokens: int = 0) -> None:
        self.request = request
        self.tokens = tokens
        """What it counts for in `InstanceColumns.outstanding_tokens`."""
        self.instance = -1
        self.attempts = 0
        self.routed_s = math.nan
        self.first_token_s = math.nan
        self.first_token_seen_s = math.nan
        self.returns = 0
        """How often an instance gave it up without having failed."""
        self.done_tokens = 0
        """Output that it had by then, which the next instance computes again as part of the
        prompt."""
        self.prefill_due_tokens = 0
        """What it counts for in `InstanceColumns.prefill_due_tokens`: 0 once it has a token."""

    @property
    def rest(self) -> Request:
        """What is left to be asked for."""
        request, done = self.request, self.done_tokens
        if not done:
            return request
        return msgspec.structs.replace(
            request,
            prompt_tokens=request.prompt_tokens + done,
            output_tokens=max(1, request.output_tokens - done),
        )


class Dispatcher:
    """Every request from its arrival to its end.

    Args:
        spec: the run.
        layout: the cluster; three of its columns say what instances still have to do, and are kept
            here.
        records: keeps what became of requests.
        router: picks an instance for each.
        submit: sends a request to an instance: (instance, request, TTFT promised, now).
    """

    WIRED: ClassVar = (
        "_view", "_records", "_router", "_router_name", "_submit", "_classes", "_every",
        "_hold_limit", "_max_attempts", "_up", "_owed_requests", "_owed_tokens",
        "_owed_prefill_tokens", "_num_instances",
    )  # fmt: skip

    def __init__(
        self,
        spec: RunSpec,
        layout: Layout,
        records: Recorder,
        router: Router,
        submit: Callable[[int, Request, float, float], object],
    ) -> None:
        self.arrived_total = 0
        self.ended_total = 0
        self.stopped = False
        """The run is over: every request has its row."""
        self.in_flight: dict[int, InFlight] = {}
        self._held: deque[InFlight] = deque()
        self._sums: dict[tuple[str, str], list[int]] = {}
        """By class and status since the last row of totals; see `_tally`."""
        self._totals_s = 0.0
        self._view = layout.view
        self._records = records
        self._router: Any = router
        self._router_name = spec.router.use
        self._submit = submit
        self._classes: dict[str, ClassSpec] = {each.name: each for each in spec.slo_class}
        self._every = spec.record.requests_every
        self._hold_limit = spec.control.hold_limit
        self._max_attempts = spec.control.max_attempts
        # An array's element takes a microsecond to change, a memory view's half of that, and a
        # request changes six.
        instances = layout.instances
        self._num_instances = len(instances.name)
        self._up: Any = instances.up.data
        self._owed_requests: Any = instances.outstanding_requests.data
        self._owed_tokens: Any = instances.outstanding_tokens.data
        self._owed_prefill_tokens: Any = instances.prefill_due_tokens.data

    def arrive(self, request: Request, now_s: float) -> None:
        """A request arrives at the front door."""
        if self.stopped:
            return
        self.arrived_total += 1
        tokens = request.prompt_tokens + request.image_tokens + request.output_tokens
        entry = InFlight(request, tokens)
        self.in_flight[request.id] = entry
        self._route(entry, now_s)

    def happened(
        self, first: int, stop: int, events: Iterable[Happening], seen_s: float, now_s: float
    ) -> None:
        """What became of requests on a node, of instances ``first`` to ``stop``.

        Args:
            first: its first instance.
            stop: the one after its last.
            events: what happened.
            seen_s: when a client would have seen it.
            now_s: now.
        """
        if self.stopped:
            return
        freed = False
        for request_id, event, t_s, preemptions in events:
            entry = self.in_flight.get(request_id)
            if entry is None or not first <= entry.instance < stop:
                continue  # of an attempt that was given up
            if event == "first_token":
                self._prefilled(entry)
                if not entry.done_tokens:  # else the first of its rest
                    entry.first_token_s, entry.first_token_seen_s = t_s, seen_s
            else:
                status = "completed" if event == "finished" else "rejected"
                self._end(entry, status, t_s, seen_s, preemptions)
                freed = True
        if freed and self._held:
            self.release_held(now_s)

    def given_up(
        self, given: Iterable[tuple[int, int, int, str]], t_s: float, seen_s: float, now_s: float
    ) -> None:
        """An instance has given requests up: send them elsewhere, or let them end.

        Args:
            given: id of each, the instance, tokens that it has made, and why.
            t_s: when, on the node.
            seen_s: when a client would have seen it.
            now_s: now.
        """
        if self.stopped:
            return
        back = []
        for request_id, instance, output_tokens, why in given:
            entry = self.in_flight.get(request_id)
            if entry is None or entry.instance != instance:
                continue  # of an attempt that was given up
            if why == "squashed":
                self._end(entry, "rejected", t_s, seen_s, 0)
                continue
            self._take_back(entry)
            entry.returns += 1
            entry.done_tokens += output_tokens
            back.append(entry)
        for entry in back:  # once all are off the account of where they were
            self._route(entry, now_s)
        self.release_held(now_s)

    def reroute(self, instances: Collection[int], now_s: float) -> None:
        """Send what these instances had elsewhere."""
        if self.stopped:
            return
        orphans = [entry for entry in self.in_flight.values() if entry.instance in instances]
        for entry in orphans:
            self._take_back(entry)
            entry.first_token_s = entry.first_token_seen_s = math.nan
            entry.done_tokens = 0
            if entry.attempts - entry.returns >= self._max_attempts:
                self._end(entry, "lost", math.nan, math.nan, 0)
            else:
                self._route(entry, now_s)

    def release_held(self, now_s: float) -> None:
        """Offer held requests to the router again, oldest first."""
        if self.stopped:
            return
        for _ in range(len(self._held)):
            if not self._route(self._held.popleft(), now_s):
                # Put back at the end: restore its place at the front.
                self._held.rotate(1)
                break

    def stop(self, now_s: float) -> None:
        """Write down the requests that are still on their way."""
        self.stopped = True
        for entry in list(self.in_flight.values()):
            self._record(entry, "in_flight", math.nan, math.nan, 0)
        self._record_totals(now_s)

    def sum_up(self, now_s: float) -> None:
        """Write down counts of all requests, if it is time and they were counted."""
        if self._sums and now_s - self._totals_s >= TOTALS_PERIOD_S - 1e-9:
            self._record_totals(now_s)

    def _route(self, entry: InFlight, now_s: float) -> bool:
        """Send a request to the router's choice, or hold it; True if it was sent."""
        self._view.now_s = now_s
        request = entry.request
        found = self._router.route(request, self._view)
        chosen = -1 if found is None else self._checked(found)
        if chosen < 0 or not self._up[chosen]:
            if len(self._held) >= self._hold_limit:
                self._end(entry, "rejected", now_s, now_s, 0)
            else:
                self._held.append(entry)
            return False
        entry.instance = chosen
        entry.attempts += 1
        entry.routed_s = now_s
        done_tokens = entry.done_tokens
        due_tokens = request.prompt_tokens + request.image_tokens + done_tokens
        entry.prefill_due_tokens = due_tokens
        self._owed_requests[chosen] += 1
        self._owed_tokens[chosen] += entry.tokens
        self._owed_prefill_tokens[chosen] += due_tokens
        if done_tokens:
            self._submit(chosen, entry.rest, math.inf, now_s)
        else:
            self._submit(chosen, request, self._classes[request.slo_class].ttft_s, now_s)
        return True

    def _checked(self, found: Any) -> int:
        try:
            chosen = index(found)  # it may be one of NumPy's
        except TypeError:
            raise PolicyError(
                f"router {self._router_name!r}: {found!r} is no instance's index"
            ) from None
        if not 0 <= chosen < self._num_instances:
            raise PolicyError(
                f"router {self._router_name!r}: instance {chosen} is none of "
                f"0..{self._num_instances - 1}"
            )
        return chosen

    def _take_back(self, entry: InFlight) -> None:
        instance = entry.instance
        if instance >= 0:
            self._owed_requests[instance] -= 1
            self._owed_tokens[instance] -= entry.tokens
            self._prefilled(entry)
        entry.instance = -1

    def _prefilled(self, entry: InFlight) -> None:
        """No prompt of this request is due where it is: it has a token, or leaves."""
        if entry.prefill_due_tokens:
            self._owed_prefill_tokens[entry.instance] -= entry.prefill_due_tokens
            entry.prefill_due_tokens = 0

    def _end(
        self, entry: InFlight, status: str, t_s: float, seen_s: float, preemptions: int
    ) -> None:
        self.in_flight.pop(entry.request.id, None)
        self.ended_total += 1
        self._record(entry, status, t_s, seen_s, preemptions)
        self._take_back(entry)

    def _record(
        self, entry: InFlight, status: str, t_s: float, seen_s: float, preemptions: int
    ) -> None:
        request = entry.request
        slo_class = self._classes[request.slo_class]
        if self._every > 1:
            self._tally(request, slo_class, entry, status, seen_s)
            if request.id % self._every:
                return
        # In the order of the table.
        self._records.request(
            (
                request.id,
                request.tenant,
                request.slo_class,
                slo_class.pool,
                entry.instance,
                request.arrival_s,
                entry.routed_s,
                entry.first_token_s,
                entry.first_token_seen_s,
                t_s,
                seen_s,
                request.prompt_tokens,
                request.image_tokens,
                request.num_images,
                request.output_tokens,
                preemptions,
                entry.attempts,
                status,
                slo_class.ttft_s,
                slo_class.tpot_s,
            )
        )

    def _tally(
        self, request: Request, slo_class: ClassSpec, entry: InFlight, status: str, seen_s: float
    ) -> None:
        """Count a request whose row may not be kept."""
        key = (request.slo_class, status)
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = [0, 0, 0, 0, 0]
        sums[0] += 1
        sums[1] += request.prompt_tokens
        sums[2] += request.image_tokens
        sums[3] += request.output_tokens
        if status == "completed":
            # The rule of testbed.analysis.latency.
            first_s, gaps = entry.first_token_seen_s, request.output_tokens - 1
            slow = first_s - request.arrival_s > slo_class.ttft_s
            slow = slow or (gaps > 0 and (seen_s - first_s) / gaps > slo_class.tpot_s)
            sums[4] += not slow

    def _record_totals(self, now_s: float) -> None:
        self._totals_s = now_s
        for (name, status), sums in sorted(self._sums.items()):
            self._records.totals(now_s, name, status, sums)
        self._sums.clear()
