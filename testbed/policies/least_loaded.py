"""Send each request to the instance of its pool with the fewest outstanding tokens.

Outstanding tokens are prompt and output tokens sent there and not finished, by the coordinator's
own account, so nothing is stale. Output lengths count as they turned out: an oracle, as in most
published baselines of this name. Ties go to the instance listed first.

>>> from testbed.core.view import view_of
>>> from testbed.policies import Request
>>> view = view_of([[0.0, 0.0, 0.0]], outstanding_tokens=[900.0, 120.0, 500.0])
>>> LeastLoaded().route(Request(0, 0.0, 10, 10), view)
1
"""

from __future__ import annotations

import numpy as np

from testbed.policies import Request, View


class LeastLoaded:
    """Joins the shortest queue, counted in tokens."""

    def route(self, request: Request, view: View) -> int | None:
        """The least loaded instance, or None while the whole pool is down."""
        instances = view.instances
        usable = (instances.pool == view.pool_of_class[request.slo_class]) & instances.up
        tokens = np.where(usable, instances.outstanding_tokens, np.inf)
        chosen = int(np.argmin(tokens))
        return chosen if usable[chosen] else None
