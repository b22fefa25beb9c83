"""Times of GPU kernels in closed form: what an iteration is built up from.

Each kernel is a start time and the larger of a memory time and a compute time, joined by a power
mean of order ``overlap`` (infinite: a perfect roofline; 1: no overlap at all). What roofline tools
leave out, and measurement shows, is kept as a constant with a meaning:

- *waves*: a matrix product runs as waves of output tiles over the SMs; the last wave is part empty;
- *blocks*: an attention kernel runs one block per (sequence, head, 64 or 128 queries), each with a
  start of its own, and ends with its longest;
- *mixed batches*: FlashAttention-2 gives a decoding sequence that shares a batch with a prefill
  chunk a whole tile of query rows. It then costs as many (query, key) pairs as the tile has rows,
  2 to 3 times its memory time on GPUs where that is not hidden. This follows from the kernel's
  tiling, and explains mixed batches of three models on two GPUs with the constants of prefill
  alone (`docs/fidelity.md`);
- *experts*: which of them a batch wakes, and the rows each is padded to.

Constants are fitted by `testbed.analysis.fitting`. All functions broadcast over arrays, and take
the SM clock as a share ``x`` of the highest: compute times go as 1/x, memory times do not.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np


class Gemm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dense matrix product of one precision."""

    start_s: float
    bandwidth_frac: float
    """Of the data sheet's bandwidth, for weights."""
    peak_frac: float
    """Of the data sheet's operations at this precision."""
    overlap: float
    wave: float
    """Waves of tiles lost in filling and emptying the GPU."""


class DecodeAttention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attention of one query token per sequence, split along the context."""

    start_s: float
    seq_s: float
    """Per sequence and KV head."""
    bandwidth_frac: float


class PrefillAttention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attention of prompt chunks, and of decodes that share their batch."""

    start_s: float
    block_s: float
    """Per block of query rows and head, on one SM."""
    peak_frac: float
    tail: float
    """Part of the longest block's own time that nothing else covers."""
    rows: float
    """Query rows of a tile."""
    packs_groups: bool
    """Whether the queries of one KV head share a tile (FlashAttention-3)."""


class Moe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fused mixture-of-experts kernel of one precision."""

    start_s: float
    bandwidth_frac: float
    peak_frac: float
    overlap: float
    pad_rows: float
    """Rows lost per woken expert to tile padding."""
    spread: float
    """Wakes as many experts as this share of the tokens would, routed evenly."""
    traffic: float
    """Activation bytes moved, over those of inputs and outputs."""
    hot: float
    """The busiest of ``ep`` GPUs has ``ep ** hot`` times the mean load."""


class Reduce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All-reduce among the GPUs of one node, inside a CUDA graph."""

    start_s: float
    hop_s: float
    """Per further GPU."""
    sync_s: float
    """Second barrier, for messages above about 100 kB."""
    bytes_per_s: float
    """Ring bandwidth of one direction."""


class Elementwise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Norms, rotary embedding, activation: kernels that only move activations."""

    start_s: float
    bandwidth_frac: float


class Chip(msgspec.Struct, frozen=True):
    """Data-sheet numbers that kernel times are shares of."""

    peak_flops: float
    """Dense operations per second at BF16; twice that at FP8, four times at FP4."""
    hbm_bytes_per_s: float
    num_sms: int


def gemm_s(
    gemm: Gemm, chip: Chip, m: Any, n: Any, k: Any, *, weight_bytes: float = 2.0,
    speed: float = 1.0, x: float = 1.0,
) -> Any:  # fmt: skip
    """Seconds of an (m, k) by (k, n) product, ``m`` tokens.

    Args:
        gemm: constants of the precision.
        chip: the GPU.
        m, n, k: shape.
        weight_bytes: per element of the (k, n) matrix.
        speed: operations per second over those at BF16.
        x: SM clock over the highest.
    """
    moved = weight_bytes * n * k + 2.0 * m * (n + k)
    rows = np.where(m <= 16, 16.0, np.where(m <= 64, np.ceil(m / 32) * 32.0, np.ceil(m / 64) * 64))
    wave = 2.0 * 128 * 128 * k * chip.num_sms
    work = 2.0 * rows * n * k + gemm.wave * wave
    memory_s = moved / (chip.hbm_bytes_per_s * gemm.bandwidth_frac)
    compute_s = work / (chip.peak_flops * speed * gemm.peak_frac * x)
    return gemm.start_s + _mean(memory_s, compute_s, gemm.overlap)


def decode_attention_s(
    kernel: DecodeAttention, chip: Chip, num_seqs: Any, context: Any, kv_heads: Any, kv_bytes: Any
) -> Any:
    """Seconds of decode attention in one layer.

    Args:
        kernel, chip: constants.
        num_seqs: sequences.
        context: sum of their contexts, tokens.
        kv_heads: KV heads on this GPU.
        kv_bytes: keys and values of one token in one layer on this GPU.
    """
    memory_s = kv_bytes * context / (chip.hbm_bytes_per_s * kernel.bandwidth_frac)
    return kernel.start_s + kernel.seq_s * num_seqs * kv_heads + memory_s


def prefill_attention_s(
    kernel: PrefillAttention,
    decode: DecodeAttention,
    chip: Chip,
    tokens: Any,
    before: Any,
    num_seqs: Any,
    context: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    *,
    num_prefills: Any = 1,
    x: float = 1.0,
) -> Any:
    """Seconds of attention in one layer for a chunk, alone or with decodes beside it.

    Args:
        kernel, decode, chip: constants.
        tokens: of one chunk; there are ``num_prefills`` alike.
        before: tokens of the chunk's prompt already in the cache.
        num_seqs: decoding sequences in the same batch.
        context: sum of their contexts.
        heads, kv_heads: on this GPU.
        head_dim: width of a head.
        num_prefills: prompts with such a chunk.
        x: SM clock over the highest.
    """
    pair_s = 4.0 * head_dim * heads / (chip.peak_flops * kernel.peak_frac * x)
    blocks = np.ceil(tokens / kernel.rows)
    pairs = num_prefills * blocks * kernel.rows * (before + 0.5 * (tokens + kernel.rows))
    ctas = (num_prefills * blocks + num_seqs) * heads / chip.num_sms
    mean_context = context / np.maximum(num_seqs, 1)
    longest = np.maximum(before + tokens, mean_context) * kernel.rows
    alone_s = longest * pair_s * chip.num_sms / np.maximum(heads, 1)
    memory_s = 4.0 * kv_heads * head_dim * context
    memory_s = memory_s / (chip.hbm_bytes_per_s * decode.bandwidth_frac)
    decode_s = np.maximum(memory_s, mixed_rows(kernel, heads, kv_heads) * context * pair_s)
    return (
        kernel.start_s
        + kernel.block_s / x * ctas
        + pairs * pair_s
        + decode_s
        + kernel.tail * alone_s
    )


def mixed_rows(kernel: PrefillAttention, heads: Any, kv_heads: Any) -> Any:
    """Pairs that a token of context costs a decode in a mixed batch.

    One tile of rows for each query head, or for each KV head where groups share a tile.
    """
    return kernel.rows * (kv_heads / heads) if kernel.packs_groups else kernel.rows


def encoder_attention_s(
    peak_frac: Any, start_s: Any, chip: Chip, tiles: Any, patches: Any, heads: Any, head_dim: Any,
    x: float = 1.0,
) -> Any:  # fmt: skip
    """Seconds of full attention among the patches of each tile, one layer.

    Head widths are padded to 64, 96 or 128, as the kernels do.
    """
    padded = np.where(head_dim <= 64, 64, np.where(head_dim <= 96, 96, 128))
    work = 4.0 * tiles * heads * padded * patches * (patches + 128.0)
    return start_s + work / (chip.peak_flops * peak_frac * x)


def awake_experts(moe: Moe, tokens: Any, experts: Any, active: Any) -> Any:
    """Experts that at least one of ``tokens`` tokens is routed to.

    Independent choices of ``active`` of ``experts``; skewed routing counts as fewer tokens.
    """
    return experts * (1.0 - (1.0 - active / experts) ** (tokens * moe.spread))


def moe_s(
    moe: Moe, chip: Chip, tokens: Any, hidden: Any, ffn: Any, experts: Any, active: Any, *,
    tp: Any = 1, ep: Any = 1, weight_bytes: float = 2.0, speed: float = 1.0, x: float = 1.0,
    woken: Any = None,
) -> Any:  # fmt: skip
    """Seconds of the experts of one layer, split ``tp`` ways in width and ``ep`` ways in number.

    Args:
        moe, chip: constants.
        tokens: of the whole batch.
        hidden, ffn: of the layer and of one expert.
        experts, active: in all, and per token.
        tp, ep: how they are split.
        weight_bytes, speed, x: as for `gemm_s`.
        woken: how many experts take part, where that is known.
    """
    width = ffn / tp
    share = ep ** (moe.hot - 1.0)
    if woken is None:
        woken = awake_experts(moe, tokens, experts, active)
    awake = np.minimum(woken * share, experts / ep)
    rows = tokens * active * share
    weights = 3.0 * hidden * width * weight_bytes * awake
    activations = 2.0 * moe.traffic * (tokens * hidden + rows * (hidden + 3.0 * width))
    work = 6.0 * hidden * width * (rows + awake * moe.pad_rows)
    memory_s = (weights + activations) / (chip.hbm_bytes_per_s * moe.bandwidth_frac)
    compute_s = work / (chip.peak_flops * speed * moe.peak_frac * x)
    return moe.start_s + _mean(memory_s, compute_s, moe.overlap)


def reduce_s(reduce: Reduce, message_bytes: Any, num_gpus: Any) -> Any:
    """Seconds of an all-reduce of so many bytes among ``num_gpus`` (0 for one)."""
    ring = 2.0 * (num_gpus - 1) / num_gpus * message_bytes / reduce.bytes_per_s
    sync_s = reduce.sync_s * np.minimum(1.0, message_bytes / 1e5)
    total = reduce.start_s + reduce.hop_s * (num_gpus - 1) + sync_s + ring
    return np.where(np.asarray(num_gpus) > 1, total, 0.0)


def elementwise_s(kernel: Elementwise, chip: Chip, moved_bytes: Any) -> Any:
    """Seconds of a kernel that moves so many bytes."""
    return kernel.start_s + moved_bytes / (chip.hbm_bytes_per_s * kernel.bandwidth_frac)


def _mean(first: Any, second: Any, order: float) -> Any:
    """Power mean without the division by two: the larger, softened where both are alike."""
    larger = np.maximum(first, second)
    smaller = np.minimum(first, second)
    return larger * (1.0 + (smaller / larger) ** order) ** (1.0 / order)
