"""Time and work of one engine iteration, in closed form.

An iteration runs the linear layers over its tokens (decoding sequences plus prefill chunk), reads
the KV cache of decoding sequences, computes attention of the chunk, encodes images, and pays the
host. It is built up kernel by kernel (`emulators.kernels`, constants fitted per GPU) and then
reduced to

    base(sequences, prefill tokens, prefills, tiles; x) + a(x) * context tokens + b(x) * pairs

with ``x`` the SM clock over its highest value. Only context and pairs change within a run of alike
iterations, both linearly: that is what lets the engine sum a run at once. ``base`` is a table over
tokens, made once for each clock and interpolated; so is the output head over sequences.

The reduction leaves out what is not linear: the tail of the longest attention block, the rounding
of chunks to tiles, and interpolation between table entries. `docs/fidelity.md` states its error,
and ``kernels_s`` gives the unreduced sum to compare with.

In a batch that mixes decodes with a prefill chunk, a token of context may cost more than in pure
decoding (`emulators.kernels.mixed_rows`): ``per_context_token_mixed_s``.

A scalar evaluation is plain float arithmetic on precomputed lists: under 2 microseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from typing import Any, Literal

import msgspec
import numpy as np

from emulators import corrections, kernels
from emulators.kernels import Chip, Gemm, Moe
from emulators.models import BYTES_PER_WEIGHT, ModelCard
from emulators.profiles import GpuProfile
from testbed.core.view import Floats

Precision = Literal["bf16", "fp8", "fp4", "int4"]

_KNOTS = np.unique(
    np.concatenate(
        [np.arange(1, 17), np.arange(16, 65, 16), np.geomspace(64, 65536, 61).round()]
    ).astype(int)
)
"""Token counts at which tables hold values."""
_CLOCKS = 1000
"""Tables are kept for clocks rounded to this many parts: an error under 0.1 %."""
_LEVELS = np.linspace(0.1, 1.0, 19)
"""Clock shares at which the array form has tables."""


class Stack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a serving engine adds to the kernels of an iteration.

    It belongs to the engine, not to the GPU: the same GPU, model and batch run 3 times slower
    under a 2024 engine than under a 2025 one (`docs/fidelity.md`).
    """

    iteration_s: float
    """Scheduling and launching that no kernel hides."""
    seq_s: float
    """Per sequence: sampling, detokenising, streaming."""
    token_s: float = 0.0
    """Per prompt token."""
    kernel_scale: float = 1.0
    """Kernel times in service over kernel times measured alone."""


class IterationCost:
    """Cost of iterations of a model on ``tp * pp * sp`` GPUs; answers `emulators.engine.Cost`.

    Args:
        model: its card.
        gpu: profile of the GPUs.
        tp: tensor-parallel degree: each matrix is split.
        pp: pipeline stages; one batch passes them in turn.
        ep: how many ways experts are split, within ``tp``; 1 splits their width instead.
        sp: sequence-parallel degree: each GPU group takes a part of a prompt's tokens.
        kvp: KV-parallel degree: each takes a part of every context. Shares the groups of ``sp``.
        precision: of the layers' matrices; the card's own if not given.
        cuda_graphs: off, an iteration cannot be shorter than launching its kernels one by one.
        stack: what the serving engine adds; the profile's if not given, and then with what
            measured serving of the model shows beyond it (`emulators.corrections`).
        correct: off, leave that correction out.

    Raises:
        ValueError: a degree does not fit the model or the others.

    >>> from emulators.models import load_model
    >>> from emulators.profiles import load_gpu
    >>> cost = IterationCost(load_model("llama-3.1-8b"), load_gpu("h100-sxm"))
    >>> itl_s = cost.base_s(16, 0, 0, 0, 1.0) + 16 * 800 * cost.per_context_token_s(1.0)
    >>> 0.007 < itl_s < 0.011
    True
    """

    def __init__(
        self,
        model: ModelCard,
        gpu: GpuProfile,
        *,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        sp: int = 1,
        kvp: int = 1,
        precision: Precision | None = None,
        cuda_graphs: bool = True,
        stack: Stack | None = None,
        correct: bool = True,
    ) -> None:
        for name, degree in {"tp": tp, "pp": pp, "ep": ep, "sp": sp, "kvp": kvp}.items():
            if degree < 1:
                raise ValueError(f"{name} = {degree} must be at least 1")
        if ep > 1 and ep != tp:
            raise ValueError(f"ep = {ep} must be 1 or equal tp = {tp}")
        if model.layers < pp:
            raise ValueError(f"pp = {pp} exceeds the {model.layers} layers of {model.name}")
        if precision is not None:
            model = msgspec.structs.replace(model, bytes_per_weight=BYTES_PER_WEIGHT[precision])
        self.model, self.gpu = model, gpu
        self.tp, self.pp, self.ep, self.sp, self.kvp = tp, pp, ep, sp, kvp
        self.num_gpus = tp * pp * max(sp, kvp)
        self.cuda_graphs = cuda_graphs
        self.stack = stack or Stack(gpu.host_iteration_s, gpu.host_seq_s)
        self._plan = _plan(model, gpu, tp, ep)
        self._scale = scale = self.stack.kernel_scale
        chip = self._plan.chip

        layers, windowed = model.num_attention_layers, model.windowed_layers
        full = layers - windowed
        heads, kv_heads = self._plan.heads, self._plan.kv_heads
        kv_bytes = self._plan.kv_bytes
        decode, prefill = gpu.decode_attention, gpu.prefill_attention
        head_dim = self._plan.head_dim

        # Decode attention.
        byte_s = scale / (chip.hbm_bytes_per_s * decode.bandwidth_frac)
        self._context_s = full * kv_bytes * byte_s / kvp
        window_s = windowed * kv_bytes * model.window_tokens * byte_s / kvp
        self._decode_start_s = scale * layers * decode.start_s
        state_bytes = 2.0 * model.linear_layers * model.linear_state_bytes / (tp * kvp)
        self._decode_seq_s = scale * layers * decode.seq_s * kv_heads + window_s
        self._decode_seq_s += state_bytes * byte_s

        # Prefill attention; decodes beside it.
        pair_s = 4.0 * head_dim * heads / (chip.peak_flops * prefill.peak_frac) * scale
        self._pair_s = full * pair_s / sp
        self._mixed_s = full * float(kernels.mixed_rows(prefill, heads, kv_heads)) * pair_s / kvp
        block_s = scale * layers * prefill.block_s * heads / chip.num_sms
        self._prefill_start_s = scale * layers * prefill.start_s
        self._block_s = block_s
        # The longest block ends alone; the context before a chunk would lengthen it further.
        tail_s = prefill.tail * prefill.rows * pair_s * chip.num_sms / heads
        self._tail_s = scale * layers * tail_s / sp
        self._token_x_s = block_s / prefill.rows / sp + full * pair_s * 0.5 * prefill.rows / sp
        self._token_x_s += windowed * pair_s * model.window_tokens / sp

        # Work, per GPU.
        share = 1.0 / (tp * pp)
        q_dim = float(model.heads * model.head_dim)
        latent = model.latent
        if latent is not None:
            q_dim = model.heads * (latent.nope_dim + latent.rope_dim + latent.v_dim) / 2
        self.decode_tables: dict[float, dict[int, tuple[float, float, float]]] = {}
        self.flops_per_pair = 4.0 * q_dim * full * share / sp
        self.bytes_per_pair = 0.0  # keys are re-read from cache, not from HBM, within a tile
        decode_dim = q_dim
        if latent is not None:  # absorbed: queries meet the latent vector itself
            decode_dim = model.heads * (latent.kv_rank + 0.5 * latent.rope_dim)
        # Executed, not needed: queries of a KV head fill a tile only in part.
        padding = max(1.0, prefill.rows / (heads / kv_heads)) if prefill.packs_groups else 1.0
        padding = min(padding, 16.0) if latent is None else 1.0
        self.flops_per_context_token = 4.0 * decode_dim * full * share / kvp * padding
        self.bytes_per_context_token = full * kv_bytes / pp / kvp
        speed = 1.0 / self._plan.speed
        self._flops_token = 2.0 * model.token_params * share / sp * speed
        self._flops_head = 2.0 * model.head_params * share
        self._seq_bytes = (windowed * kv_bytes * model.window_tokens / kvp + state_bytes) / pp
        self._seq_flops = 4.0 * decode_dim * windowed * model.window_tokens * share / kvp
        self._seq_flops += gpu.decode_ops * model.layers * model.hidden / pp  # on every GPU of tp
        self._seq_flops += gpu.sample_ops * model.vocab * share
        # Activations in and out of each linear layer, once per token.
        self._bytes_token = 24.0 * model.layers * model.hidden * share / sp
        weight = model.bytes_per_weight
        embeddings = model.head_params * 2.0
        self._fixed_bytes = share * (
            (model.attention_params + model.plain_ffn_params) * weight + embeddings
        )
        self._expert_bytes = share * model.ffn_params * weight
        self._experts, self._active = float(model.experts), float(model.experts_active)
        # Rows that experts are padded to are multiplied like the others.
        self._pad_flops = 0.0
        if model.experts > 1:
            self._pad_flops = 2.0 * model.ffn_params * self._plan.moe.pad_rows * share * speed
        self._spread = self._plan.moe.spread
        self._send_s = (pp - 1) * (gpu.reduce.start_s + gpu.reduce.hop_s)
        self._send_token_s = (pp - 1) * 2.0 * model.hidden / gpu.reduce.bytes_per_s
        self._launch_s = 0.0 if cuda_graphs else gpu.launch_s * self._plan.num_kernels

        vision = model.vision
        self._flops_tile = self._bytes_tile = 0.0
        self._tile_s = self._encode_start_s = 0.0
        if vision is not None:
            linear = 2.0 * vision.params * vision.patches_per_tile
            attention = 4.0 * vision.layers * vision.hidden * vision.patches_per_tile**2
            self._flops_tile = (linear + attention) * share * pp
            self._bytes_tile = 48.0 * vision.layers * vision.hidden * vision.patches_per_tile / tp
            one, eight = (
                float(_encode_s(gpu, chip, vision, tp, tiles)) * vision.encode_scale * scale
                for tiles in (4, 32)
            )
            self._tile_s = (eight - one) / 28
            self._encode_start_s = max(0.0, one - 4 * self._tile_s)

        self._knee = gpu.bandwidth_knee_frac
        self._tables: dict[int, tuple[list[float], list[float], list[float], list[float]]] = {}
        self._x = 0.0
        self._host_s: Floats = self.stack.seq_s * _KNOTS
        self._host, self._host_slope = _lines(self._host_s)
        self._added_flops: list[float] = []
        self._added_flops_slope: list[float] = []
        self._select(1.0)
        self.correction: corrections.Correction | None = None
        if stack is None and correct:
            self.correction = corrections.correction_for(gpu.name, model, self.num_gpus)
        if self.correction is not None:
            seconds, operations = corrections.tables(self, self.correction)
            self._host_s = self._host_s + np.interp(_KNOTS, corrections.BATCHES, seconds)
            self._host, self._host_slope = _lines(self._host_s)
            added = np.interp(_KNOTS, corrections.BATCHES, operations)
            self._added_flops, self._added_flops_slope = _lines(added)

    # Scalars: what the engine asks.

    def base_s(
        self,
        num_seqs: int,
        prefill_tokens: int,
        num_prefill_seqs: int,
        encode_tiles: int,
        clock_frac: float,
    ) -> float:
        """Seconds of an iteration apart from context and pairs."""
        if clock_frac != self._x:
            self._select(clock_frac)
        stack = self.stack
        total_s = stack.iteration_s
        tokens = num_seqs + prefill_tokens
        if tokens:
            if self.sp > 1 and prefill_tokens:
                tokens = num_seqs + -(-prefill_tokens // self.sp)
            place = _knot(tokens)
            linear_s = self._linear[place] + self._linear_slope[place] * tokens
            heads = num_seqs + num_prefill_seqs
            place = _knot(heads or 1)
            linear_s += self._head[place] + self._head_slope[place] * heads
            total_s += self._host[place] + self._host_slope[place] * heads
            if prefill_tokens:
                # Half a tile of each prompt is padding, on average; decodes have a tile each.
                linear_s += (
                    self._prefill_start_s
                    + (
                        self._token_x_s * prefill_tokens
                        + self._block_s * (num_seqs + 0.5 * num_prefill_seqs)
                        + self._tail_s * prefill_tokens / (num_prefill_seqs or 1)
                    )
                    / clock_frac
                )
                total_s += stack.token_s * prefill_tokens
            else:
                linear_s += self._decode_start_s
            if num_seqs:
                linear_s += self._decode_seq_s * num_seqs
            if linear_s < self._launch_s:
                linear_s = self._launch_s
            total_s += linear_s + self._send_s + self._send_token_s * tokens
        if encode_tiles:
            total_s += self.encode_s(encode_tiles, clock_frac)
        return total_s

    def encode_s(self, encode_tiles: int, clock_frac: float) -> float:
        """Seconds for the vision encoder to do so many tiles: compute-bound, so linear in them."""
        if not encode_tiles:
            return 0.0
        return (self._encode_start_s + encode_tiles * self._tile_s) / clock_frac

    def per_context_token_s(self, clock_frac: float) -> float:
        """Seconds per token of KV cache that decoding sequences read."""
        if clock_frac < self._knee:
            return self._context_s * self._knee / clock_frac
        return self._context_s

    def per_context_token_mixed_s(self, clock_frac: float) -> float:
        """The same in an iteration that also prefills."""
        return max(self.per_context_token_s(clock_frac), self._mixed_s / clock_frac)

    def per_pair_s(self, clock_frac: float) -> float:
        """Seconds per (query, key) pair of prefill attention."""
        return self._pair_s / clock_frac

    def base_flops(
        self, num_seqs: int, prefill_tokens: int, num_prefill_seqs: int, encode_tiles: int
    ) -> float:
        """Operations executed in an iteration apart from context and pairs, per GPU.

        In operations at BF16: one at FP8 counts by the time it takes at peak. Padding counts, as
        it draws power: these are for `emulators.power`.
        """
        tokens: int = num_seqs + prefill_tokens
        padding = self._pad_flops * self._awake(tokens) if self._pad_flops else 0.0
        total = (
            padding
            + self._flops_token * tokens
            + self._flops_head * (num_seqs + num_prefill_seqs)
            + self._seq_flops * num_seqs
            + self._flops_tile * encode_tiles
        )
        if self._added_flops and num_seqs:
            place = _knot(num_seqs)
            total += self._added_flops[place] + self._added_flops_slope[place] * num_seqs
            if total < 0.0:
                total = 0.0
        return total

    def base_bytes(
        self, num_seqs: int, prefill_tokens: int, num_prefill_seqs: int, encode_tiles: int
    ) -> float:
        """Bytes of memory traffic of an iteration apart from context and pairs, per GPU."""
        tokens = num_seqs + prefill_tokens
        moved = self._bytes_tile * encode_tiles
        if tokens:
            moved += self._fixed_bytes + self._bytes_token * tokens
            moved += self._expert_bytes * self._awake(tokens) + self._seq_bytes * num_seqs
        return moved

    def _awake(self, tokens: float) -> float:
        if self._experts == 1.0:
            return 1.0
        idle: float = (1.0 - self._active / self._experts) ** (tokens * self._spread)
        return self._experts * (1.0 - idle)

    # Arrays: a row of GPUs at once.

    def iterations_s(
        self,
        num_seqs: Floats,
        context_tokens: Floats,
        prefill_tokens: Floats,
        prefill_pairs: Floats,
        num_prefill_seqs: Floats,
        encode_tiles: Floats,
        clock_frac: Floats,
    ) -> Floats:
        """Seconds of one iteration on each of many instances; arguments broadcast.

        Between 19 clock levels the tables are interpolated linearly in the period (1/x).
        """
        columns = np.broadcast_arrays(
            num_seqs, context_tokens, prefill_tokens, prefill_pairs, num_prefill_seqs,
            encode_tiles, clock_frac,
        )  # fmt: skip
        seqs, context, prompt, pairs, prefills, tiles, x = (
            np.asarray(column, float) for column in columns
        )
        tokens, heads = seqs + np.ceil(prompt / self.sp), seqs + prefills
        linear_s = self._interpolate(tokens, x, 0) + self._interpolate(heads, x, 1)
        attending = self._prefill_start_s + (
            self._token_x_s * prompt + self._block_s * (seqs + 0.5 * prefills)
            + self._tail_s * prompt / np.maximum(prefills, 1)
        ) / x  # fmt: skip
        linear_s += np.where(prompt > 0, attending, self._decode_start_s)
        linear_s = np.maximum(linear_s + self._decode_seq_s * seqs, self._launch_s)
        stack = self.stack
        running = tokens > 0
        total_s = stack.iteration_s + np.where(
            running,
            linear_s + np.interp(heads, _KNOTS, self._host_s) + stack.token_s * prompt
            + self._send_s + self._send_token_s * tokens,
            0.0,
        )  # fmt: skip
        slow = np.maximum(1.0, self._knee / x)
        per_context = self._context_s * slow
        per_context = np.where(prompt > 0, np.maximum(per_context, self._mixed_s / x), per_context)
        encoding = (self._encode_start_s + tiles * self._tile_s) / x
        total: Floats = (
            total_s + per_context * context + self._pair_s / x * pairs
            + np.where(tiles > 0, encoding, 0.0)
        )  # fmt: skip
        return total

    def _interpolate(self, count: Floats, x: Floats, which: int) -> Floats:
        """Table ``which`` (0 linear layers, 1 head) at these counts and clocks."""
        grid = self._grids()[which]
        level = np.clip(np.searchsorted(_LEVELS, x, side="right") - 1, 0, len(_LEVELS) - 2)
        low, high = 1.0 / _LEVELS[level], 1.0 / _LEVELS[level + 1]
        part = (1.0 / x - low) / (high - low)
        place = np.clip(np.searchsorted(_KNOTS, count, side="right") - 1, 0, len(_KNOTS) - 2)
        within = (count - _KNOTS[place]) / (_KNOTS[place + 1] - _KNOTS[place])
        ends = grid[level] if level.ndim == 0 else None
        if ends is not None:
            first = ends[place] + within * (ends[place + 1] - ends[place])
            ends = grid[level + 1]
            second = ends[place] + within * (ends[place + 1] - ends[place])
        else:
            first = grid[level, place]
            first = first + within * (grid[level, place + 1] - first)
            second = grid[level + 1, place]
            second = second + within * (grid[level + 1, place + 1] - second)
        total: Floats = np.where(count > 0, first + part * (second - first), 0.0)
        return total

    def _grids(self) -> tuple[Floats, Floats]:
        return _grids(self._plan, self._knee, self._scale)

    def _select(self, clock_frac: float) -> None:
        """Make the tables of a clock the present ones."""
        key = max(1, round(clock_frac * _CLOCKS))
        tables = self._tables.get(key)
        if tables is None:
            scale = self._scale
            linear, head = _tables(self._plan, self._knee, key / _CLOCKS)
            tables = (*_lines(linear * scale), *_lines(head * scale))
            self._tables[key] = tables
        self._linear, self._linear_slope, self._head, self._head_slope = tables
        self._x = clock_frac

    # Parts, for comparison with measured ones.

    def attention_base_s(self, num_seqs: int, prefill_tokens: int) -> float:
        """The part of ``base_s`` that belongs to attention, for one chunk, at full clock."""
        total = self._decode_seq_s * num_seqs
        if not prefill_tokens:
            return total + self._decode_start_s
        return (
            total
            + self._prefill_start_s
            + (self._token_x_s + self._tail_s) * prefill_tokens
            + self._block_s * (num_seqs + 0.5)
        )

    def kernels_s(
        self,
        num_seqs: float,
        context_tokens: float,
        prefill_tokens: float,
        before_tokens: float,
        clock_frac: float = 1.0,
    ) -> float:
        """The same iteration summed kernel by kernel, one chunk, without host or encoder.

        Args:
            num_seqs, context_tokens: decoding sequences and the sum of their contexts.
            prefill_tokens, before_tokens: of the chunk, and of its prompt before it.
            clock_frac: SM clock over the highest.
        """
        plan, gpu, model = self._plan, self.gpu, self.model
        tokens = np.array([num_seqs + prefill_tokens])
        heads = np.array([num_seqs + (1 if prefill_tokens else 0)])
        total = plan.linear_s(tokens, clock_frac, self._knee) + plan.head_s(
            heads, clock_frac, self._knee
        )
        layers = model.num_attention_layers
        if prefill_tokens:
            attention = kernels.prefill_attention_s(
                gpu.prefill_attention, gpu.decode_attention, plan.chip, prefill_tokens,
                before_tokens, num_seqs, context_tokens, plan.heads, plan.kv_heads,
                plan.head_dim, x=clock_frac,
            )  # fmt: skip
        else:
            attention = kernels.decode_attention_s(
                gpu.decode_attention, plan.chip, num_seqs, context_tokens, plan.kv_heads,
                plan.kv_bytes,
            )  # fmt: skip
        return float(total[0] + layers * attention) * self._scale

    # Beside the GPU.

    def preprocess_s(self, images: int = 1) -> float:
        """CPU seconds to decode and resize images of 896 x 896 on one core; 0 for a text model."""
        return self.gpu.preprocess_s * images if self.model.vision else 0.0

    def kv_blocks(
        self,
        gpu_memory_frac: float = 0.9,
        block_size_tokens: int = 16,
        *,
        ballast_bytes: float = 0.0,
    ) -> int:
        """KV blocks that fit beside the weights, over all GPUs; below 1 if they do not.

        As vLLM counts: the given share of each GPU's memory, less weights and the activations and
        runtime of a profiling run (``gpu.runtime_bytes``). What something else holds of each GPU
        (``ballast_bytes``) is not there to be shared.
        """
        gpu_bytes = (self.gpu.memory_bytes - ballast_bytes) * gpu_memory_frac
        gpu_bytes -= self.gpu.runtime_bytes
        replicas = max(self.sp, self.kvp)
        left = (gpu_bytes * self.tp * self.pp - self.model.weight_bytes) * replicas
        per_token = self.model.num_attention_layers * self._plan.kv_bytes * self.tp
        return int(left // (per_token * block_size_tokens))


_KNOT_LIST: list[int] = _KNOTS.tolist()
_TABLED = 4096
_KNOT_OF: list[int] = (np.searchsorted(_KNOTS, np.arange(_TABLED), side="right") - 1).tolist()


def _knot(count: int) -> int:
    """Index of the last knot at or below a count, looked up where counts mostly are."""
    return _KNOT_OF[count] if count < _TABLED else bisect_right(_KNOT_LIST, count) - 1


class _Plan:
    """Shapes of a model's kernels on one of ``tp`` GPUs, and their times over token counts."""

    def __init__(self, model: ModelCard, gpu: GpuProfile, tp: int, ep: int) -> None:
        self.model, self.gpu, self.tp, self.ep = model, gpu, tp, ep
        self.chip = gpu.chip
        weight = model.bytes_per_weight
        # Matrices narrower than FP8 are multiplied at FP4 where there is hardware for it, and
        # otherwise at BF16 after unpacking.
        if weight >= 2.0:
            self.speed = 1.0
        elif weight >= 1.0:
            self.speed = gpu.fp8_speed
        else:
            self.speed = gpu.fp4_speed
        self.gemm: Gemm = gpu.gemm_bf16 if self.speed == 1.0 else gpu.gemm_fp8
        self.moe: Moe = gpu.moe_bf16 if self.speed == 1.0 else gpu.moe_fp8
        self.heads = max(1.0, model.heads / tp)
        self.head_dim = float(model.head_dim)
        latent = model.latent
        if latent is None:
            # Fewer KV heads than GPUs: each keeps a copy of one.
            self.kv_heads = max(1.0, model.kv_heads / tp)
            self.kv_bytes = model.kv_bytes_per_token_layer * self.kv_heads / model.kv_heads
        else:
            self.kv_heads = 1.0
            self.kv_bytes = model.kv_bytes_per_token_layer
            self.head_dim = (latent.nope_dim + latent.rope_dim + latent.v_dim) / 2.0
        hidden = model.hidden
        attention: list[tuple[float, float]]
        if latent is None:
            width = (self.heads + 2 * self.kv_heads) * model.head_dim
            attention = [(width, hidden), (hidden, self.heads * model.head_dim)]
        else:
            attention = [
                (latent.q_rank + latent.kv_rank + latent.rope_dim, hidden),
                (self.heads * (latent.nope_dim + latent.rope_dim), latent.q_rank),
                (self.heads * (latent.nope_dim + latent.v_dim), latent.kv_rank),
                (hidden, self.heads * latent.v_dim),
            ]
        up = 2 if model.gated else 1

        def ffn(width: float) -> list[tuple[float, float]]:
            return [(up * width / tp, hidden), (hidden, width / tp)]

        self.parts: list[tuple[float, list[tuple[float, float]]]] = [
            (model.num_attention_layers, attention)
        ]
        if model.linear_layers:
            shape = [(model.linear_params / hidden / tp, float(hidden))]
            self.parts.append((model.linear_layers, shape))
        if model.experts == 1:
            self.parts.append((model.num_ffn_layers, ffn(model.ffn)))
        else:
            router = [(float(model.experts), float(hidden))]
            self.parts.append((model.num_ffn_layers, router))
        if model.shared_ffn:
            self.parts.append((model.num_ffn_layers, ffn(model.shared_ffn)))
        if model.dense_layers:
            self.parts.append((model.dense_layers, ffn(model.dense_ffn)))
        # Kernels that are launched: matrices, attention, and 4 small ones per layer.
        self.num_kernels = sum(count * len(shapes) for count, shapes in self.parts)
        self.num_kernels += 6 * model.layers

    def linear_s(self, tokens: Floats, x: float, knee: float) -> Floats:
        """Seconds of everything in the layers but attention, at these token counts."""
        model, chip, gpu = self.model, self.chip, self.gpu
        slow = max(1.0, knee / x)
        chip_x = Chip(chip.peak_flops, chip.hbm_bytes_per_s / slow, chip.num_sms)
        total = np.zeros(len(tokens))
        weight = model.bytes_per_weight
        for count, shapes in self.parts:
            for n, k in shapes:
                total += count * kernels.gemm_s(
                    self.gemm, chip_x, tokens, n, k, weight_bytes=weight, speed=self.speed, x=x
                )
        if model.experts > 1:
            total += model.num_ffn_layers * kernels.moe_s(
                self.moe, chip_x, tokens, model.hidden, model.ffn, model.experts,
                model.experts_active, tp=1 if self.ep > 1 else self.tp, ep=self.ep,
                weight_bytes=weight, speed=self.speed, x=x,
            )  # fmt: skip
        # Two norms with their residuals, rotary embedding, activation.
        width = (model.ffn * model.experts_active + model.shared_ffn) / self.tp
        moved = tokens * (16.0 * model.hidden + 6.0 * width)
        starts = 4 * kernels.elementwise_s(gpu.elementwise, chip_x, 0.0)
        moving = kernels.elementwise_s(gpu.elementwise, chip_x, moved) - gpu.elementwise.start_s
        total += model.layers * (starts + moving)
        if self.tp > 1:
            message = 2.0 * model.hidden * tokens
            total += 2 * model.layers * kernels.reduce_s(gpu.reduce, message, self.tp)
        return total

    def head_s(self, seqs: Floats, x: float, knee: float) -> Floats:
        """Seconds of the output head for so many sequences."""
        chip = self.chip
        slow = max(1.0, knee / x)
        chip_x = Chip(chip.peak_flops, chip.hbm_bytes_per_s / slow, chip.num_sms)
        model = self.model
        head: Floats = kernels.gemm_s(
            self.gpu.gemm_bf16, chip_x, seqs, model.vocab / self.tp, model.hidden, x=x
        )
        return head


@cache
def _plan(model: ModelCard, gpu: GpuProfile, tp: int, ep: int) -> _Plan:
    return _Plan(model, gpu, tp, ep)


@cache
def _tables(plan: _Plan, knee: float, x: float) -> tuple[Floats, Floats]:
    """Times of layers and head at `_KNOTS`, at one clock."""
    counts = _KNOTS.astype(float)
    return plan.linear_s(counts, x, knee), plan.head_s(counts, x, knee)


@cache
def _grids(plan: _Plan, knee: float, scale: float) -> tuple[Floats, Floats]:
    """The same at `_LEVELS` of clock, as (level, knot) arrays."""
    both = [_tables(plan, knee, float(level)) for level in _LEVELS]
    return scale * np.array([one[0] for one in both]), scale * np.array([one[1] for one in both])


def _lines(values: Floats) -> tuple[list[float], list[float]]:
    """Intercept and slope of the straight piece from each knot on; the last one goes on."""
    slopes = np.diff(values) / np.diff(_KNOTS)
    slopes = np.append(slopes, slopes[-1])
    return (values - slopes * _KNOTS).tolist(), slopes.tolist()


def _encode_s(gpu: GpuProfile, chip: Chip, vision: Any, tp: int, tiles: int) -> Any:
    """Seconds of the vision encoder for so many tiles in one batch, split ``tp`` ways."""
    patches = float(tiles * vision.patches_per_tile)
    hidden, width = vision.hidden, vision.hidden / tp
    shapes = [(3 * width, hidden), (hidden, width), (vision.ffn / tp, hidden)]
    shapes.append((hidden, vision.ffn / tp))
    total = sum(kernels.gemm_s(gpu.gemm_bf16, chip, patches, n, k) for n, k in shapes)
    total += kernels.encoder_attention_s(
        gpu.encoder_peak_frac, gpu.prefill_attention.start_s, chip, tiles,
        vision.patches_per_tile, vision.heads / tp, vision.head_dim,
    )  # fmt: skip
    moved = patches * (16.0 * hidden + 4.0 * vision.ffn / tp)
    total += 3 * gpu.elementwise.start_s + kernels.elementwise_s(gpu.elementwise, chip, moved)
    if tp > 1:
        total += 2 * kernels.reduce_s(gpu.reduce, 2.0 * hidden * patches, tp)
    return vision.layers * total
