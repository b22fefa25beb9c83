"""Send each request to the next instance of its pool, skipping those that are down.

>>> from testbed.core.view import view_of
>>> from testbed.policies import Request
>>> router, view = RoundRobin(), view_of([[0.0, 0.0, 0.0]])
>>> [router.route(Request(i, 0.0, 10, 10), view) for i in range(4)]
[0, 1, 2, 0]
"""

from __future__ import annotations

from testbed.policies import Request, View


class RoundRobin:
    """One turn per instance and pool."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def route(self, request: Request, view: View) -> int | None:
        """The next instance in order, or None while the whole pool is down."""
        pool = view.pool_of_class[request.slo_class]
        up, pools = view.instances.up, view.instances.pool
        count = len(up)
        index = self._last.get(pool, -1)
        for _ in range(count):
            index = index + 1 if index + 1 < count else 0
            if up[index] and pools[index] == pool:
                self._last[pool] = index
                return index
        return None
