"""A model served by the emulated engine alone: a recorded trace, or users who wait for answers.

Timing is compared with measured serving through the real queue of `emulators.engine`, not through
a formula: what a table of kernel times cannot know is how long requests wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from emulators.engine import Engine
from emulators.timing import IterationCost
from testbed.core.messages import EngineConfig, Request


class Served(NamedTuple):
    """Times of one request, seconds on the engine's clock."""

    arrival_s: float
    first_token_s: float
    last_token_s: float
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """Arrival to last token."""
        return self.last_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.last_token_s - self.first_token_s) / max(1, self.output_tokens - 1)


def build(cost: IterationCost, config: EngineConfig) -> Engine:
    """An engine for this cost, with the KV blocks that the configuration states or leaves room for.

    Raises:
        ValueError: the model does not fit into memory.
    """
    blocks = config.kv_blocks or cost.kv_blocks(config.gpu_memory_frac, config.block_size_tokens)
    if blocks < 1:
        raise ValueError(f"{cost.model.name} does not fit into {cost.num_gpus} x {cost.gpu.name}")
    model = cost.model
    return Engine(
        cost,
        config,
        kv_blocks=blocks,
        tokens_per_tile=model.tokens_per_tile,
        image_in_prompt=model.image_in_prompt,
        preprocess_s=cost.preprocess_s(),
    )


def serve_trace(engine: Engine, requests: Sequence[Request]) -> dict[int, Served]:
    """Serve requests as they arrive; those the engine rejects are left out."""
    for request in sorted(requests, key=lambda one: one.arrival_s):
        engine.submit(request, request.arrival_s)
    while engine.next_event_s < math.inf:
        engine.advance_to(engine.next_event_s)
    return _collect(engine, {request.id: request for request in requests})


def serve_closed_loop(
    engine: Engine, requests: Sequence[Request], concurrency: int, *, think_s: float = 0.0
) -> dict[int, Served]:
    """Keep ``concurrency`` requests in flight: the next is sent ``think_s`` after one has ended."""
    queue = list(reversed(requests))
    sent: dict[int, Request] = {}
    due: list[float] = [0.0] * min(concurrency, len(queue))
    seen = 0
    while True:
        next_s = engine.next_event_s
        if due and due[0] <= next_s:
            now_s = due.pop(0)
            if queue:
                request = queue.pop()
                now_s = max(now_s, engine.now_s)
                sent[request.id] = Request(
                    request.id, now_s, request.prompt_tokens, request.output_tokens
                )
                engine.submit(sent[request.id], now_s)
        elif next_s < math.inf:
            engine.advance_to(next_s)
        else:
            break
        ended = (event for event in engine.events[seen:] if event.kind != "first_token")
        due.extend(event.t_s + think_s for event in ended)
        seen = len(engine.events)
    return _collect(engine, sent)


def _collect(engine: Engine, requests: dict[int, Request]) -> dict[int, Served]:
    first_s: dict[int, float] = {}
    served: dict[int, Served] = {}
    for event in engine.events:
        if event.kind == "first_token":
            first_s[event.request_id] = event.t_s
        elif event.kind == "finished":
            request = requests[event.request_id]
            served[event.request_id] = Served(
                request.arrival_s, first_s[event.request_id], event.t_s, request.output_tokens
            )
    return served
