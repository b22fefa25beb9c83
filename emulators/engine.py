"""One serving instance: continuous batching with chunked prefill over paged KV blocks.

Theory of operation
-------------------
The engine is a state machine told the time. It does no I/O and reads no clock.

*Iteration.* Each iteration runs one token of every decoding sequence and, with what is left of the
token budget, chunks of prompts: first of sequences already being prefilled, then of waiting ones in
order of arrival, as long as their KV blocks are free. Images of a request are encoded in the
iterations before its first chunk. This is vLLM v1's order. When a decode needs a KV block and none
is free, the sequence admitted last is preempted: its blocks are freed and it goes back to the
front of the queue, to recompute its prompt and what it had generated.

*Block.* Between two changes of the batch, iterations differ only in how much context they read, and
their times form an arithmetic series: ``d_k = first + k * growth`` (iteration time is linear in
context, see `emulators.timing`). A run of them is one block, kept as (iterations, first, growth)
and summed in closed form: its end, the work done by any moment in it, and how many of its gaps fell
into each bin of the inter-token histogram. A block ends at the first completion, where KV blocks
run out, and at the boundary after anything that could change the batch: an arrival that could be
admitted, or another clock. ``collapse=False`` makes every block one iteration, with equal results.

*Bookkeeping.* A counter of decode iterations ``G`` takes the place of a counter per sequence: a
sequence that starts decoding at ``G`` with ``r`` tokens to go ends at ``G + r``, kept in a heap. A
sequence of KV length ``L`` needs a new block whenever ``L`` is a multiple of the block size, which,
as all lengths grow with ``G``, happens at values of ``G`` fixed by ``(L - G) mod block_size``;
counting sequences by that residue gives the blocks that ``m`` iterations need in O(block size).

Invariants: held blocks never exceed ``kv_blocks``; each submitted request ends in exactly one
``finished`` or ``rejected``, unless `evict` takes it back.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol

import msgspec

from emulators.timing import IterationCost
from testbed.core.messages import EngineConfig, Request

EventKind = Literal["first_token", "finished", "rejected"]


class Event(NamedTuple):
    """What became of a request, and when. ``preemptions`` counts those so far."""

    request_id: int
    kind: EventKind
    t_s: float
    preemptions: int


class Activity(NamedTuple):
    """Totals since the start: time in each phase, and work done per GPU of the instance."""

    encode_s: float
    prefill_s: float
    decode_s: float
    flops: float
    hbm_bytes: float


class Segment(NamedTuple):
    """A finished block: ``iterations`` alike, from which any token's time can be had again.

    Iteration k (from 0) took ``first_s + k * growth_s``.
    """

    t_start_s: float
    t_end_s: float
    iterations: int
    first_s: float
    growth_s: float
    num_seqs: int
    context_tokens: int
    prefill_tokens: int
    encode_tiles: int
    clock_frac: float


class Batch(NamedTuple):
    """The shape of one iteration, for somebody who runs it."""

    num_seqs: int
    """Decoding sequences."""
    context_tokens: int
    """Tokens of KV cache that they read together."""
    chunks: list[tuple[int, int]]
    """Prompt chunks: tokens, and tokens of the same prompt computed before."""
    encode_tiles: int


class Cost(Protocol):
    """Time and work of an iteration: `emulators.timing.IterationCost` is the one we ship.

    All of it per GPU of the instance, and linear in context tokens and attended pairs.
    """

    flops_per_context_token: float
    bytes_per_context_token: float
    flops_per_pair: float
    bytes_per_pair: float
    decode_tables: dict[float, dict[int, tuple[float, float, float]]]
    """For engines to keep what they asked for: by clock, then by decoding sequences."""

    def base_s(
        self,
        num_seqs: int,
        prefill_tokens: int,
        num_prefill_seqs: int,
        encode_tiles: int,
        clock_frac: float,
    ) -> float:
        """Time of an iteration apart from reading context."""
        ...

    def encode_s(self, encode_tiles: int, clock_frac: float) -> float:
        """The vision encoder's part of ``base_s``."""
        ...

    def per_context_token_s(self, clock_frac: float) -> float:
        """Time per token of KV cache read by decodes."""
        ...

    def per_context_token_mixed_s(self, clock_frac: float) -> float:
        """The same in an iteration that also prefills."""
        ...

    def per_pair_s(self, clock_frac: float) -> float:
        """Time per (query, key) pair of prefill attention."""
        ...

    def base_flops(
        self, num_seqs: int, prefill_tokens: int, num_prefill_seqs: int, encode_tiles: int
    ) -> float:
        """Operations of an iteration apart from context, per GPU."""
        ...

    def base_bytes(
        self, num_seqs: int, prefill_tokens: int, num_prefill_seqs: int, encode_tiles: int
    ) -> float:
        """Memory traffic of an iteration apart from context, per GPU."""
        ...


_EDGE_S: Final = 1e-4
_RATIO: Final = 1.02
_LOG_RATIO: Final = math.log(1.02)


class ItlHistogram:
    """Gaps between consecutive tokens, in bins 2 % wide from 0.1 ms.

    >>> gaps = ItlHistogram()
    >>> gaps.add_series(first_s=0.010, growth_s=0.00001, iterations=500, num_seqs=3)
    >>> sum(gaps.counts.values())
    1500
    """

    EDGE_S: ClassVar[float] = _EDGE_S
    RATIO: ClassVar[float] = _RATIO

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def bin_of(self, gap_s: float) -> int:
        """Bin ``b`` holds gaps from ``EDGE_S * RATIO**b`` up; shorter ones are in bin 0."""
        return int(math.log(gap_s / _EDGE_S) / _LOG_RATIO) if gap_s > _EDGE_S else 0

    def add(self, gap_s: float, count: int = 1) -> None:
        """Count one gap ``count`` times."""
        place = self.bin_of(gap_s)
        self.counts[place] = self.counts.get(place, 0) + count

    def add_series(self, first_s: float, growth_s: float, iterations: int, num_seqs: int) -> None:
        """Count ``num_seqs`` gaps of each iteration ``first_s + k * growth_s``."""
        counts = self.counts
        low = self.bin_of(first_s)
        high = self.bin_of(first_s + growth_s * (iterations - 1))
        if low == high:
            counts[low] = counts.get(low, 0) + iterations * num_seqs
            return
        start = 0
        for place in range(low, high):
            edge_s = _EDGE_S * _RATIO ** (place + 1)
            stop = min(iterations, max(start, math.ceil((edge_s - first_s) / growth_s)))
            if stop > start:
                counts[place] = counts.get(place, 0) + (stop - start) * num_seqs
            start = stop
        if iterations > start:
            counts[high] = counts.get(high, 0) + (iterations - start) * num_seqs

    def drain(self) -> dict[int, int]:
        """The counts so far, which start again from zero."""
        counts, self.counts = self.counts, {}
        return counts


class _Sequence:
    """Token state of one request inside the engine."""

    __slots__ = (
        "arrival_s",
        "emitted",
        "end",
        "id",
        "images",
        "kv_start",
        "last_token_s",
        "output",
        "preemptions",
        "prefilled",
        "prompt",
        "start",
        "tiles",
        "to_prefill",
        "ttft_s",
    )

    def __init__(
        self,
        request_id: int,
        prompt: int,
        output: int,
        tiles: int,
        arrival_s: float,
        ttft_s: float,
    ) -> None:
        self.id = request_id
        self.arrival_s = arrival_s
        self.ttft_s = ttft_s  # promised from arrival to first token
        self.prompt = prompt
        self.output = output
        self.images = tiles
        self.tiles = tiles  # still to be encoded
        self.to_prefill = prompt
        self.prefilled = 0
        self.emitted = 0
        self.start = 0  # value of G when decoding began
        self.end = -1  # value of G at which the last token is out; -1 while not decoding
        self.kv_start = 0  # KV tokens when decoding began
        self.last_token_s = -1.0
        self.preemptions = 0


class _Block:
    """Iterations that run as one; see the module's story."""

    __slots__ = (
        "bytes_first",
        "bytes_growth",
        "chunks",
        "clock_frac",
        "context",
        "encode_s",
        "first_s",
        "flops_first",
        "flops_growth",
        "growth_s",
        "iterations",
        "num_seqs",
        "prefill_tokens",
        "seen",
        "seen_s",
        "t_end_s",
        "t_start_s",
        "tiles",
    )

    t_start_s: float
    t_end_s: float
    iterations: int
    first_s: float
    growth_s: float
    num_seqs: int
    context: int
    prefill_tokens: int
    chunks: list[tuple[_Sequence, int]]
    tiles: list[tuple[_Sequence, int]]
    encode_s: float
    flops_first: float
    flops_growth: float
    bytes_first: float
    bytes_growth: float
    clock_frac: float
    seen_s: float
    seen: tuple[int, float]

    def done_at(self, t_s: float) -> tuple[int, float]:
        """Iterations complete at ``t_s``, and the share of the next one that has passed."""
        if t_s != self.seen_s:  # a sample asks for several things of one instant
            self.seen_s, self.seen = t_s, self._done_at(t_s)
        return self.seen

    def _done_at(self, t_s: float) -> tuple[int, float]:
        elapsed_s = t_s - self.t_start_s
        if elapsed_s <= 0:
            return 0, 0.0
        if t_s >= self.t_end_s:
            return self.iterations, 0.0
        first_s, growth_s = self.first_s, self.growth_s
        half = first_s - 0.5 * growth_s
        if growth_s > 0:
            k = int((math.sqrt(half * half + 2 * growth_s * elapsed_s) - half) / growth_s)
        else:
            k = int(elapsed_s / first_s)
        k = min(k, self.iterations - 1)
        spent_s = k * first_s + 0.5 * growth_s * k * (k - 1)
        # The root is exact to rounding; the iteration it lies in may be off by one.
        if spent_s > elapsed_s and k > 0:
            k -= 1
            spent_s = k * first_s + 0.5 * growth_s * k * (k - 1)
        elif k + 1 < self.iterations and spent_s + first_s + growth_s * k <= elapsed_s:
            spent_s += first_s + growth_s * k
            k += 1
        return k, min(1.0, max(0.0, (elapsed_s - spent_s) / (first_s + growth_s * k)))

    def end_after(self, iterations: int) -> float:
        """When the given number of iterations is complete."""
        return (
            self.t_start_s
            + iterations * self.first_s
            + 0.5 * self.growth_s * iterations * (iterations - 1)
        )


_SEQUENCE_FIELDS: Final = (
    "id", "prompt", "output", "images", "tiles", "arrival_s", "ttft_s", "to_prefill", "prefilled",
    "emitted", "start", "end", "kv_start", "last_token_s", "preemptions",
)  # fmt: skip
_BLOCK_FIELDS: Final = (
    "t_start_s", "t_end_s", "iterations", "first_s", "growth_s", "num_seqs", "context",
    "prefill_tokens", "encode_s", "flops_first", "flops_growth", "bytes_first", "bytes_growth",
    "clock_frac",
)  # fmt: skip
_ENGINE_FIELDS: Final = (
    "now_s", "preprocess_slowdown", "prompt_tokens_total", "preemptions_total", "_workers",
    "_by_deadline", "_decodes", "_num_decoding", "_kv_tokens", "_residues", "_free",
    "_output_total", "_encode_s", "_prefill_s", "_decode_s", "_flops", "_hbm_bytes",
)  # fmt: skip
# With their sequences, which `save` lists once.
_ENGINE_PARTS: Final = (
    "events", "segments", "itl", "_preparing", "_waiting", "_running", "_prefilling", "_ends",
    "_block",
)  # fmt: skip
# Follows from how the engine was made, its batch limit and its clock.
_ENGINE_WIRED: Final = (
    "config", "kv_blocks", "clock_frac", "_cost", "_ours", "_max_num_seqs", "_max_batched",
    "_context_flops", "_context_bytes",
    "_pair_flops", "_pair_bytes", "_tokens_per_tile", "_image_in_prompt", "_preprocess_s",
    "_keep_segments", "_measured", "_collapse", "_block_size", "_encode_budget",
    "_per_context_s", "_per_context_mixed_s", "_per_pair_s", "_decode_base",
)  # fmt: skip


class Engine:
    """Serves requests with one copy of a model; see the module's story.

    Args:
        cost: time and work of an iteration.
        config: batch limits; `EngineConfig.collapse` sums runs of iterations.
        kv_blocks: KV blocks of the instance.
        tokens_per_tile: image tokens that one encoder tile yields; 0 for a model without vision.
        image_in_prompt: whether image tokens join the prompt (decoder-only vision models) or are
            attended to by cross-attention layers only.
        preprocess_s: CPU time to prepare one image.
        keep_segments: keep every finished block in ``segments`` until drained.
        measured: iterations are run by somebody else and take as long as they take: each is one
            block without an end until `complete` gives it one. ``cost`` then counts work only.

    Raises:
        ValueError: a limit is out of range.
    """

    def __init__(
        self,
        cost: Cost,
        config: EngineConfig,
        *,
        kv_blocks: int,
        tokens_per_tile: int = 0,
        image_in_prompt: bool = True,
        preprocess_s: float = 0.0,
        clock_frac: float = 1.0,
        keep_segments: bool = False,
        measured: bool = False,
    ) -> None:
        if kv_blocks < 1:
            raise ValueError(f"kv_blocks = {kv_blocks} must be at least 1")
        if config.max_batched_tokens <= config.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens = {config.max_batched_tokens} must exceed "
                f"max_num_seqs = {config.max_num_seqs}"
            )
        self.config = config
        self._max_num_seqs, self._max_batched = config.max_num_seqs, config.max_batched_tokens
        self.kv_blocks = kv_blocks
        self.now_s = 0.0
        self.events: list[Event] = []
        self.segments: list[Segment] = []
        self.itl = ItlHistogram()
        self.preprocess_slowdown = 1.0
        self.prompt_tokens_total = 0
        self.preemptions_total = 0
        self._cost = cost
        self._ours = cost if isinstance(cost, IterationCost) else None
        self._context_flops = cost.flops_per_context_token
        self._context_bytes = cost.bytes_per_context_token
        self._pair_flops, self._pair_bytes = cost.flops_per_pair, cost.bytes_per_pair
        self._tokens_per_tile = tokens_per_tile
        self._image_in_prompt = image_in_prompt
        self._preprocess_s = preprocess_s
        self._keep_segments = keep_segments
        self._measured = measured
        self._collapse = config.collapse and not measured
        self._block_size = config.block_size_tokens
        self._encode_budget = max(1, config.max_batched_tokens // max(1, tokens_per_tile))

        self._workers = [0.0] * config.preprocess_workers  # when each CPU worker is free
        self._preparing: list[tuple[float, int, _Sequence]] = []
        self._waiting: deque[_Sequence] = deque()
        self._by_deadline = False
        self._running: dict[int, _Sequence] = {}  # in order of admission
        self._prefilling: deque[_Sequence] = deque()
        self._ends: list[tuple[int, int, int, _Sequence]] = []
        self._decodes = 0  # G
        self._num_decoding = 0
        self._kv_tokens = 0  # of decoding sequences
        self._residues = [0] * config.block_size_tokens
        self._free = kv_blocks
        self._output_total = 0

        self._block: _Block | None = None
        self._encode_s = self._prefill_s = self._decode_s = 0.0
        self._flops = self._hbm_bytes = 0.0
        self._set_clock(clock_frac)

    # What others may see.

    @property
    def num_running(self) -> int:
        """Sequences admitted to the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests queued for admission or having their images prepared."""
        return len(self._waiting) + len(self._preparing)

    @property
    def next_event_s(self) -> float:
        """When the state changes next by itself; infinite when idle."""
        end_s = self._block.t_end_s if self._block is not None else math.inf
        if self._preparing and self._preparing[0][0] < end_s:
            return self._preparing[0][0]
        return end_s

    def kv_used_blocks(self, t_s: float) -> int:
        """KV blocks held at ``t_s``, within the current block of iterations."""
        used = self.kv_blocks - self._free
        if self._block is not None:
            done = self._block.done_at(t_s)[0]
            used += self._blocks_needed(done) if self._num_decoding else 0
            if self._block.iterations > 1 and self._block.chunks:
                sequence, take = self._block.chunks[0]
                held = self._ceil_blocks(sequence.prefilled)
                used += self._ceil_blocks(sequence.prefilled + take * done) - held
        return used

    def output_tokens_total(self, t_s: float) -> int:
        """Tokens given out by ``t_s``, first tokens included."""
        if self._block is None:
            return self._output_total
        return self._output_total + self._block.num_seqs * self._block.done_at(t_s)[0]

    def activity(self, t_s: float) -> Activity:
        """Totals at ``t_s``, which must lie between the last `advance_to` and `next_event_s`.

        Work inside an iteration is spread evenly over it.
        """
        encode_s, prefill_s, decode_s, flops, hbm_bytes = self.totals(t_s)
        return Activity(encode_s, prefill_s, decode_s, flops, hbm_bytes)

    def totals(self, t_s: float) -> tuple[float, float, float, float, float]:
        """`activity` as plain numbers, for whoever asks thousands of engines."""
        block = self._block
        encode_s, prefill_s, decode_s = self._encode_s, self._prefill_s, self._decode_s
        flops, hbm_bytes = self._flops, self._hbm_bytes
        if block is None:
            return encode_s, prefill_s, decode_s, flops, hbm_bytes
        done, part = block.done_at(t_s)
        work = self._work(block, done)
        encoding_s, prefilling_s, decoding_s, more_flops, more_bytes = work
        if part > 0.0:
            duration_s = part * (block.first_s + block.growth_s * done)
            part_encode_s = part * block.encode_s
            if block.chunks or block.tiles:
                prefilling_s += duration_s - part_encode_s
            else:
                decoding_s += duration_s - part_encode_s
            encoding_s += part_encode_s
            more_flops += part * (block.flops_first + block.flops_growth * done)
            more_bytes += part * (block.bytes_first + block.bytes_growth * done)
        return (
            encode_s + encoding_s,
            prefill_s + prefilling_s,
            decode_s + decoding_s,
            flops + more_flops,
            hbm_bytes + more_bytes,
        )

    def requests(self) -> Iterator[int]:
        """Ids of all requests in the engine, in no particular order."""
        for _, _, sequence in self._preparing:
            yield sequence.id
        for sequence in self._waiting:
            yield sequence.id
        yield from self._running

    # What others may ask.

    def submit(self, request: Request, t_s: float, ttft_s: float = math.inf) -> None:
        """Take a request in at ``t_s``. One that can never fit is rejected at once.

        ``ttft_s`` is what it was promised, from its arrival to its first token.

        Raises:
            ValueError: ``t_s`` lies before what `advance_to` has already passed.
        """
        if t_s < self.now_s:
            raise ValueError(f"submit at {t_s} s, but the engine is at {self.now_s} s")
        self.advance_to(t_s)
        tiles = 0
        if request.image_tokens and self._tokens_per_tile:
            tiles = -(-request.image_tokens // self._tokens_per_tile)
        prompt = request.prompt_tokens
        if self._image_in_prompt:
            prompt += request.image_tokens
        prompt = max(1, prompt)
        output = max(1, request.output_tokens)
        if self._ceil_blocks(prompt + output) > self.kv_blocks:
            self.events.append(Event(request.id, "rejected", t_s, 0))
            return
        sequence = _Sequence(request.id, prompt, output, tiles, request.arrival_s, ttft_s)
        if request.num_images and self._preprocess_s > 0:
            ready_s = self._prepare(request.num_images, t_s)
            heapq.heappush(self._preparing, (ready_s, request.id, sequence))
        else:
            self._enqueue(sequence, t_s)

    def set_clock(self, clock_frac: float, t_s: float) -> None:
        """Run at another SM clock, a share of the highest, from the next iteration on.

        Raises:
            ValueError: the share is not in (0, 1].
        """
        if clock_frac == self.clock_frac:
            return
        if not 0 < clock_frac <= 1:
            raise ValueError(f"clock_frac = {clock_frac} must be in (0, 1]")
        self.advance_to(t_s)
        self._cut(t_s)
        self._set_clock(clock_frac)

    def advance_to(self, t_s: float) -> None:
        """Let everything happen that is due by ``t_s``."""
        while True:
            block = self._block
            end_s = block.t_end_s if block is not None else math.inf
            if self._preparing and self._preparing[0][0] <= min(end_s, t_s):
                ready_s, _, sequence = heapq.heappop(self._preparing)
                self.now_s = max(self.now_s, ready_s)
                self._enqueue(sequence, ready_s)
            elif block is not None and end_s <= t_s:
                self.now_s = end_s
                self._finish(block)
                self._plan(end_s)
            else:
                break
        if t_s > self.now_s:
            self.now_s = t_s

    @property
    def batch(self) -> Batch | None:
        """What the iteration in progress computes; None when idle."""
        block = self._block
        if block is None:
            return None
        return Batch(
            num_seqs=block.num_seqs,
            context_tokens=block.context,
            chunks=[(take, sequence.prefilled) for sequence, take in block.chunks],
            encode_tiles=sum(count for _, count in block.tiles),
        )

    def complete(self, t_s: float) -> None:
        """The iteration in progress has ended at ``t_s`` (``measured`` engines only).

        Raises:
            ValueError: there is none, or the engine does not wait to be told.
        """
        block = self._block
        if not self._measured or block is None:
            raise ValueError("no iteration waits to be completed")
        block.t_end_s = max(t_s, block.t_start_s)
        block.first_s = block.t_end_s - block.t_start_s
        block.encode_s = min(block.encode_s, block.first_s)
        block.seen_s = -1.0
        self.advance_to(block.t_end_s)

    def set_batch(self, max_num_seqs: int, t_s: float) -> None:
        """Run at most so many sequences from the next iteration on; what runs already goes on.

        Raises:
            ValueError: below 1, or not below ``max_batched_tokens``.
        """
        if not 1 <= max_num_seqs < self.config.max_batched_tokens:
            raise ValueError(
                f"max_num_seqs = {max_num_seqs} must be in [1, {self.config.max_batched_tokens})"
            )
        self.advance_to(t_s)
        self.config = msgspec.structs.replace(self.config, max_num_seqs=max_num_seqs)
        self._max_num_seqs = max_num_seqs
        self._cut_if_admitting(t_s)

    def order(self, by_deadline: bool, t_s: float) -> None:
        """Serve the queue by deadline, or by arrival, from now on; preempted ones stay in front."""
        self.advance_to(t_s)
        self._by_deadline = by_deadline
        self._waiting = deque(sorted(self._waiting, key=self._rank))
        self._cut_if_admitting(t_s)

    def withdraw(self, t_s: float, late_frac: float = -1.0) -> list[tuple[int, int]]:
        """Take requests out of the queue: their ids, and the tokens that each has given out.

        With ``late_frac`` those only that have no token yet, and have waited for longer than so
        many times what they were promised.
        """
        self.advance_to(t_s)
        taken: list[tuple[int, int]] = []
        kept: deque[_Sequence] = deque()
        for sequence in self._waiting:
            waited_s = t_s - sequence.arrival_s
            late = sequence.emitted == 0 and waited_s > late_frac * sequence.ttft_s
            if late_frac < 0.0 or late:
                taken.append((sequence.id, sequence.emitted))
            else:
                kept.append(sequence)
        self._waiting = kept
        self._cut_if_admitting(t_s)
        return taken

    def progress(self, t_s: float) -> list[tuple[int, int]]:
        """Ids of all requests, and the tokens that each has given out by ``t_s``."""
        done = 0
        if self._block is not None and self._block.num_seqs:
            done = self._block.done_at(t_s)[0]
        found = [(sequence.id, sequence.emitted) for _, _, sequence in self._preparing]
        found += [(sequence.id, sequence.emitted) for sequence in self._waiting]
        for sequence in self._running.values():
            emitted = sequence.emitted
            if sequence.end >= 0:
                emitted = sequence.output - (sequence.end - self._decodes) + done
            found.append((sequence.id, emitted))
        return found

    def evict(self, t_s: float) -> list[int]:
        """Give up all requests at ``t_s`` (a reconfiguration or a crash); returns their ids.

        Work of the iteration in progress is counted, its tokens are lost.
        """
        self.advance_to(t_s)
        block = self._block
        if block is not None and block.num_seqs:
            done = block.done_at(t_s)[0]
            if done:
                self.itl.add_series(block.first_s, block.growth_s, done, block.num_seqs)
        total = self.activity(t_s)
        self._encode_s, self._prefill_s, self._decode_s, self._flops, self._hbm_bytes = total
        ids = list(self.requests())
        self._output_total = self.output_tokens_total(t_s)
        self._block = None
        self._preparing.clear()
        self._waiting.clear()
        self._running.clear()
        self._prefilling.clear()
        self._ends.clear()
        self._num_decoding = self._kv_tokens = 0
        self._residues = [0] * self._block_size
        self._free = self.kv_blocks
        return ids

    # All of it, to be kept and put back.

    def save(self) -> dict[str, Any]:
        """The state as plain data; `restore` gives it to an engine made alike."""
        order: dict[int, _Sequence] = {}
        for _, _, sequence in self._preparing:
            order[sequence.id] = sequence
        for sequence in self._waiting:
            order[sequence.id] = sequence
        order.update(self._running)
        block = self._block
        return {
            "sequences": [
                [getattr(each, name) for name in _SEQUENCE_FIELDS] for each in order.values()
            ],
            "preparing": [(ready_s, each.id) for ready_s, _, each in self._preparing],
            "waiting": [each.id for each in self._waiting],
            "running": list(self._running),
            "prefilling": [each.id for each in self._prefilling],
            # Entries of sequences preempted since would be passed over.
            "ends": [
                (end, each.id) for end, _, count, each in self._ends if count == each.preemptions
            ],
            "block": None if block is None else [getattr(block, name) for name in _BLOCK_FIELDS],
            "chunks": [] if block is None else [(each.id, take) for each, take in block.chunks],
            "tiles": [] if block is None else [(each.id, count) for each, count in block.tiles],
            "gaps": self.itl.counts,
            "events": [tuple(event) for event in self.events],
            "segments": [tuple(segment) for segment in self.segments],
            "max_num_seqs": self.config.max_num_seqs,
            "clock_frac": self.clock_frac,
            "plain": [getattr(self, name) for name in _ENGINE_FIELDS],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be what `save` saw."""
        sequences: dict[int, _Sequence] = {}
        for values in state["sequences"]:
            sequence = _Sequence(values[0], 1, 1, 0, 0.0, 0.0)
            for name, value in zip(_SEQUENCE_FIELDS, values):  # noqa: B905
                setattr(sequence, name, value)
            sequences[sequence.id] = sequence
        self._max_num_seqs = state["max_num_seqs"]
        self.config = msgspec.structs.replace(self.config, max_num_seqs=self._max_num_seqs)
        self._set_clock(state["clock_frac"])
        for name, value in zip(_ENGINE_FIELDS, state["plain"]):  # noqa: B905
            setattr(self, name, value)
        self._preparing = [(ready_s, each, sequences[each]) for ready_s, each in state["preparing"]]
        self._waiting = deque([sequences[each] for each in state["waiting"]])
        self._running = {each: sequences[each] for each in state["running"]}
        self._prefilling = deque([sequences[each] for each in state["prefilling"]])
        self._ends = [
            (end, each, sequences[each].preemptions, sequences[each]) for end, each in state["ends"]
        ]
        heapq.heapify(self._ends)
        self.itl.counts = state["gaps"]
        self.events = [Event(*event) for event in state["events"]]
        self.segments = [Segment(*segment) for segment in state["segments"]]
        self._block = None
        if state["block"] is not None:
            block = _Block()
            for name, value in zip(_BLOCK_FIELDS, state["block"]):  # noqa: B905
                setattr(block, name, value)
            block.chunks = [(sequences[each], take) for each, take in state["chunks"]]
            block.tiles = [(sequences[each], count) for each, count in state["tiles"]]
            block.seen_s = -1.0
            self._block = block

    # Arrival.

    def _prepare(self, num_images: int, t_s: float) -> float:
        """Give the images to the CPU workers, one each as they fall free; when the last is done."""
        ready_s = t_s
        each_s = self._preprocess_s * self.preprocess_slowdown
        for _ in range(num_images):
            done_s = max(t_s, self._workers[0]) + each_s
            heapq.heapreplace(self._workers, done_s)
            ready_s = max(ready_s, done_s)
        return ready_s

    def _enqueue(self, sequence: _Sequence, t_s: float) -> None:
        blocked = bool(self._waiting)
        if self._by_deadline:
            place = len(self._waiting)
            rank = self._rank(sequence)
            while place and self._rank(self._waiting[place - 1]) > rank:
                place -= 1
            self._waiting.insert(place, sequence)
            blocked = place > 0
        else:
            self._waiting.append(sequence)
        if self._block is None:
            self._plan(t_s)
        elif not blocked and self._could_admit(self._block):
            self._cut(t_s)

    def _rank(self, sequence: _Sequence) -> float:
        """Place in the queue: lowest first. Who has a token was preempted and stays in front."""
        if sequence.emitted:
            return -math.inf
        return sequence.arrival_s + (sequence.ttft_s if self._by_deadline else 0.0)

    def _cut_if_admitting(self, t_s: float) -> None:
        """The queue or the batch's limit has changed: plan again at the next boundary."""
        if self._waiting and self._block is not None and self._could_admit(self._block):
            self._cut(t_s)

    def _could_admit(self, block: _Block) -> bool:
        """Whether the next iteration of this block would have room for another sequence."""
        if len(self._running) >= self._max_num_seqs:
            return False
        return block.num_seqs + block.prefill_tokens < self._max_batched

    def _cut(self, t_s: float) -> None:
        """End the current block with the iteration in progress at ``t_s``."""
        block = self._block
        if block is None or block.iterations == 1:
            return
        done, part = block.done_at(t_s)
        keep = min(block.iterations, done + (part > 0.0))
        keep = max(keep, 1)
        if keep < block.iterations:
            block.iterations = keep
            block.t_end_s = block.end_after(keep)
            block.seen_s = -1.0

    def _set_clock(self, clock_frac: float) -> None:
        self.clock_frac = clock_frac
        self._per_context_s = self._cost.per_context_token_s(clock_frac)
        self._per_context_mixed_s = self._cost.per_context_token_mixed_s(clock_frac)
        self._per_pair_s = self._cost.per_pair_s(clock_frac)
        # Time, operations and bytes of pure decoding by batch size, at this clock. Engines alike
        # share them: a thousand tables of one's own would not stay in a processor's cache.
        tables = self._cost.decode_tables
        if clock_frac not in tables:
            tables[clock_frac] = {}
        self._decode_base: dict[int, tuple[float, float, float]] = tables[clock_frac]

    # KV blocks.

    def _ceil_blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _blocks_needed(self, iterations: int) -> int:
        """KV blocks that decoding takes in the next so many iterations."""
        residues, size = self._residues, self._block_size
        needed = iterations // size * self._num_decoding
        place = -self._decodes % size
        for _ in range(iterations % size):
            needed += residues[place]
            place = place - 1 if place else size - 1
        return needed

    def _iterations_until_full(self, free: int, most: int) -> int:
        """How many iterations of decoding fit into ``free`` blocks, up to ``most``."""
        size, count = self._block_size, self._num_decoding
        if count * (most // size + 1) <= free:
            return most
        rounds = free // count
        left = free - rounds * count
        iterations = rounds * size
        residues, decodes = self._residues, self._decodes
        # One more round at most: a whole one takes ``count`` blocks and fewer are left.
        for step in range(size):
            left -= residues[-(decodes + step) % size]
            if left < 0:
                break
            iterations += 1
        return min(most, iterations)

    def _kv_length(self, sequence: _Sequence) -> int:
        return sequence.kv_start + self._decodes - sequence.start

    def _preempt_last(self, t_s: float) -> _Sequence:
        """Throw the sequence admitted last back to the front of the queue."""
        sequence = self._running.popitem()[1]
        if sequence.end >= 0:
            length = self._kv_length(sequence)
            self._residues[(length - self._decodes) % self._block_size] -= 1
            self._num_decoding -= 1
            self._kv_tokens -= length
            self._free += self._ceil_blocks(length)
            sequence.emitted = sequence.output - (sequence.end - self._decodes)
            sequence.last_token_s = t_s
            sequence.end = -1
        else:
            self._prefilling.remove(sequence)
            self._free += self._ceil_blocks(sequence.prefilled)
        sequence.to_prefill = sequence.prompt + sequence.emitted
        sequence.prefilled = 0
        sequence.tiles = sequence.images
        sequence.preemptions += 1
        self.preemptions_total += 1
        self._waiting.appendleft(sequence)
        return sequence

    # Blocks of iterations.

    def _plan(self, t_s: float) -> None:
        """Choose the next batch and start its block at ``t_s``."""
        size = self._block_size
        preempted = False
        while self._num_decoding:
            needed = self._residues[-self._decodes % size]
            if needed <= self._free:
                break
            self._preempt_last(t_s)
            preempted = True
        needed = self._residues[-self._decodes % size] if self._num_decoding else 0

        budget = self._max_batched - self._num_decoding
        chunks: list[tuple[_Sequence, int]] = []
        tiles: list[tuple[_Sequence, int]] = []
        encode_budget = self._encode_budget
        taken = 0  # KV blocks for chunks
        for sequence in list(self._prefilling):
            if budget <= 0 or sequence.id not in self._running:
                break
            if sequence.tiles:
                encoding = min(sequence.tiles, encode_budget)
                if encoding:
                    tiles.append((sequence, encoding))
                    encode_budget -= encoding
                if encoding < sequence.tiles:
                    break
            take = min(sequence.to_prefill - sequence.prefilled, budget)
            blocks = self._chunk_blocks(sequence, take)
            while blocks > self._free - needed - taken:
                preempted = True
                if self._preempt_last(t_s) is sequence:
                    break
                needed = self._residues[-self._decodes % size] if self._num_decoding else 0
            if sequence.id not in self._running:
                tiles = [entry for entry in tiles if entry[0] is not sequence]
                break
            chunks.append((sequence, take))
            budget -= take
            taken += blocks
        if not preempted:
            while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
                sequence = self._waiting[0]
                encoding = min(sequence.tiles, encode_budget)
                if sequence.tiles and not encoding:
                    break
                take = 0
                if encoding == sequence.tiles:
                    take = min(sequence.to_prefill, budget)
                    blocks = self._chunk_blocks(sequence, take)
                    if blocks > self._free - needed - taken:
                        break
                    taken += blocks
                self._waiting.popleft()
                self._running[sequence.id] = sequence
                self._prefilling.append(sequence)
                if encoding:
                    tiles.append((sequence, encoding))
                    encode_budget -= encoding
                if not take:
                    break
                chunks.append((sequence, take))
                budget -= take
        if not (self._num_decoding or chunks or tiles):
            self._block = None
            return
        self._start(t_s, chunks, tiles, needed + taken, alone=preempted)

    def _chunk_blocks(self, sequence: _Sequence, take: int) -> int:
        held = self._ceil_blocks(sequence.prefilled)
        return self._ceil_blocks(sequence.prefilled + take) - held

    def _start(
        self,
        t_s: float,
        chunks: list[tuple[_Sequence, int]],
        tiles: list[tuple[_Sequence, int]],
        blocks_first: int,
        *,
        alone: bool,
    ) -> None:
        """Begin a block with this batch; ``alone`` keeps it to one iteration."""
        clock_frac, num_seqs = self.clock_frac, self._num_decoding
        context = self._kv_tokens + num_seqs
        block = _Block()
        block.t_start_s = t_s
        block.seen_s = -1.0
        block.num_seqs = num_seqs
        block.context = context
        block.chunks = chunks
        block.tiles = tiles
        block.clock_frac = clock_frac
        block.encode_s = 0.0
        if not chunks and not tiles:
            base = self._decode_base.get(num_seqs)
            if base is None:
                base = self._base(num_seqs, 0, 0, 0)
                self._decode_base[num_seqs] = base
            base_s, base_flops, base_bytes = base
            block.prefill_tokens = 0
            block.first_s = base_s + self._per_context_s * context
            block.growth_s = self._per_context_s * num_seqs
            block.flops_first = base_flops + self._context_flops * context
            block.bytes_first = base_bytes + self._context_bytes * context
            block.flops_growth = self._context_flops * num_seqs
            block.bytes_growth = self._context_bytes * num_seqs
            iterations = 1
            if self._collapse and not (alone and self._waiting):
                most = self._next_end() - self._decodes
                iterations = self._iterations_until_full(self._free, most)
        else:
            prefill_tokens = pairs = num_tiles = 0
            for sequence, take in chunks:
                prefill_tokens += take
                pairs += take * sequence.prefilled + take * (take + 1) // 2
            for _, count in tiles:
                num_tiles += count
            base_s, base_flops, base_bytes = self._base(
                num_seqs, prefill_tokens, len(chunks), num_tiles
            )
            block.prefill_tokens = prefill_tokens
            if num_tiles:
                block.encode_s = self._cost.encode_s(num_tiles, clock_frac)
            block.first_s = base_s + self._per_context_mixed_s * context + self._per_pair_s * pairs
            block.flops_first = (
                base_flops + self._context_flops * context + self._pair_flops * pairs
            )
            block.bytes_first = (
                base_bytes + self._context_bytes * context + self._pair_bytes * pairs
            )
            # Each further chunk of the same prompt attends to one chunk more.
            more_pairs = chunks[0][1] * chunks[0][1] if len(chunks) == 1 else 0
            block.growth_s = self._per_context_mixed_s * num_seqs + self._per_pair_s * more_pairs
            block.flops_growth = self._context_flops * num_seqs + self._pair_flops * more_pairs
            block.bytes_growth = self._context_bytes * num_seqs + self._pair_bytes * more_pairs
            iterations = self._equal_chunks(chunks) if not (tiles or alone) else 1
        if iterations == 1:
            block.growth_s = block.flops_growth = block.bytes_growth = 0.0
        block.iterations = iterations
        block.t_end_s = math.inf if self._measured else block.end_after(iterations)
        self._block = block

    def _base(
        self, num_seqs: int, prefill_tokens: int, num_prefill_seqs: int, encode_tiles: int
    ) -> tuple[float, float, float]:
        """Time, operations and bytes of an iteration apart from context and pairs."""
        ours = self._ours
        if ours is not None:  # known to the compiler: calls without objects
            return (
                ours.base_s(
                    num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles, self.clock_frac
                ),
                ours.base_flops(num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles),
                ours.base_bytes(num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles),
            )
        cost = self._cost
        return (
            cost.base_s(num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles, self.clock_frac),
            cost.base_flops(num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles),
            cost.base_bytes(num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles),
        )

    def _equal_chunks(self, chunks: list[tuple[_Sequence, int]]) -> int:
        """How many iterations take the same chunk of the same prompt and nothing else changes."""
        if not self._collapse or len(chunks) != 1:
            return 1
        sequence, take = chunks[0]
        if take + self._num_decoding < self._max_batched:
            return 1  # the prompt's rest: the next iteration is another batch
        iterations = (sequence.to_prefill - sequence.prefilled) // take
        if self._num_decoding:
            iterations = min(iterations, self._next_end() - self._decodes)
        if iterations > 1:
            blocks = self._blocks_needed(iterations) if self._num_decoding else 0
            if blocks + self._chunk_blocks(sequence, take * iterations) > self._free:
                return 1  # close to full: step, so that preemption falls where it must
        return max(1, iterations)

    def _next_end(self) -> int:
        """Value of the decode counter at which the next sequence ends."""
        ends = self._ends
        while ends[0][2] != ends[0][3].preemptions:
            heapq.heappop(ends)  # preempted since
        return ends[0][0]

    def _work(self, block: _Block, done: int) -> tuple[float, float, float, float, float]:
        """Phase times, FLOPs and bytes of the first ``done`` iterations of a block."""
        if not done:
            return 0.0, 0.0, 0.0, 0.0, 0.0
        series = 0.5 * done * (done - 1)
        busy_s = done * block.first_s + series * block.growth_s - block.encode_s
        flops = done * block.flops_first + series * block.flops_growth
        hbm_bytes = done * block.bytes_first + series * block.bytes_growth
        if block.chunks or block.tiles:
            return block.encode_s, busy_s, 0.0, flops, hbm_bytes
        return block.encode_s, 0.0, busy_s, flops, hbm_bytes

    def _finish(self, block: _Block) -> None:
        """Account for a block that has run to its end, and let its sequences move on."""
        t_s, iterations = block.t_end_s, block.iterations
        encode_s, prefill_s, decode_s, flops, hbm_bytes = self._work(block, iterations)
        self._encode_s += encode_s
        self._prefill_s += prefill_s
        self._decode_s += decode_s
        self._flops += flops
        self._hbm_bytes += hbm_bytes
        if self._keep_segments:
            self.segments.append(
                Segment(
                    block.t_start_s,
                    t_s,
                    iterations,
                    block.first_s,
                    block.growth_s,
                    block.num_seqs,
                    block.context,
                    block.prefill_tokens,
                    sum(count for _, count in block.tiles),
                    block.clock_frac,
                )
            )
        for sequence, count in block.tiles:
            sequence.tiles -= count
        if block.num_seqs:
            self.itl.add_series(block.first_s, block.growth_s, iterations, block.num_seqs)
            self._free -= self._blocks_needed(iterations)
            self._decodes += iterations
            self._kv_tokens += block.num_seqs * iterations
            self._output_total += block.num_seqs * iterations
            self._end_decodes(t_s)
        for sequence, take in block.chunks:
            self._free -= self._chunk_blocks(sequence, take * iterations)
            sequence.prefilled += take * iterations
            self.prompt_tokens_total += take * iterations
            if sequence.prefilled == sequence.to_prefill:
                self._end_prefill(sequence, t_s)
        self._block = None

    def _tell(self, sequence: _Sequence, kind: EventKind, t_s: float) -> None:
        # Not by the class, whose constructor is interpreted.
        told = tuple.__new__(Event, (sequence.id, kind, t_s, sequence.preemptions))
        self.events.append(told)

    def _end_decodes(self, t_s: float) -> None:
        ends, decodes = self._ends, self._decodes
        while ends and ends[0][0] <= decodes:
            _, _, preemptions, sequence = heapq.heappop(ends)
            if sequence.preemptions != preemptions:
                continue  # preempted since
            length = self._kv_length(sequence)
            self._residues[(length - decodes) % self._block_size] -= 1
            self._num_decoding -= 1
            self._kv_tokens -= length
            self._free += self._ceil_blocks(length)
            del self._running[sequence.id]
            self._tell(sequence, "finished", t_s)

    def _end_prefill(self, sequence: _Sequence, t_s: float) -> None:
        """The chunk just run gave out the sequence's next token."""
        self._prefilling.remove(sequence)
        self._output_total += 1
        if sequence.emitted == 0:
            self._tell(sequence, "first_token", t_s)
        else:
            self.itl.add(t_s - sequence.last_token_s)
        sequence.emitted += 1
        left = sequence.output - sequence.emitted
        if not left:
            self._free += self._ceil_blocks(sequence.prefilled)
            del self._running[sequence.id]
            self._tell(sequence, "finished", t_s)
            return
        sequence.start = self._decodes
        sequence.kv_start = sequence.prefilled
        sequence.end = self._decodes + left
        self._residues[(sequence.kv_start - sequence.start) % self._block_size] += 1
        self._num_decoding += 1
        self._kv_tokens += sequence.kv_start
        entry = (sequence.end, sequence.id, sequence.preemptions, sequence)
        heapq.heappush(self._ends, entry)
