"""What served models show beyond kernels and hosts: corrections learnt from measured serving.

A model card says what a model computes, not which kernels an engine picks for it, how well they
overlap with the host, or how many watts they draw. Where a model was measured in service, the ratio
of measured to computed token gap and power is known over batch sizes. It is smoothed by a Gaussian
process that pools like configurations (`testbed.analysis.pooling`) and kept in `corrections.toml`,
written by `testbed.analysis.fitting_serving` with its cross-validated error. Between batch sizes
ratios are interpolated in log2; beyond those measured they stay.

For the engine a correction becomes two tables over the number of sequences: seconds added to an
iteration, and operations added to its work. Both are of a steady state of ``prompt_tokens`` and
``output_tokens``; another mix of work keeps them and changes the rest.

>>> from emulators.models import load_model
>>> found = correction_for("h100-sxm", load_model("llama-3.1-8b"), 1)
>>> found.model, found.num_gpus
('llama-3.1-8b', 1)
>>> correction_for("rtx-4090", load_model("llama-3.1-8b"), 1) is None
True
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from emulators.models import ModelCard

if TYPE_CHECKING:
    from emulators.timing import IterationCost

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
"""Numbers of sequences at which tables hold values."""
_LEAST = 0.25
"""Share of an iteration apart from context that a correction leaves at least."""


class Correction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Measured over computed, for one model on so many GPUs."""

    gpu: str
    model: str
    """A model card, or ``dense`` and ``experts`` for what models of that kind share."""
    precision: str
    num_gpus: int
    prompt_tokens: int
    output_tokens: int
    batch: list[int]
    """Sequences; ratios below are at these."""
    gap: list[float]
    """Mean time from token to token, measured over computed."""
    power: list[float]
    """Watts while serving, the same."""
    source: str
    date: str
    error: str

    def at(self, ratios: list[float], batch: float) -> float:
        """A ratio at any batch size."""
        places = np.log2(np.array(self.batch, float))
        return float(np.interp(np.log2(max(batch, 1.0)), places, ratios))


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    heirs: dict[str, str]
    """GPUs that were not measured -> those whose corrections they take."""
    correction: list[Correction]


def precision_of(model: ModelCard) -> str:
    """How wide the weights of the layers are.

    >>> from emulators.models import load_model
    >>> precision_of(load_model("qwen3-8b"))
    'bf16'
    """
    width = model.bytes_per_weight
    return "bf16" if width >= 2.0 else "fp8" if width >= 1.0 else "4-bit"


@cache
def _file() -> _File:
    raw = resources.files("emulators").joinpath("corrections.toml").read_bytes()
    return msgspec.toml.decode(raw, type=_File)


def correction_for(gpu: str, model: ModelCard, num_gpus: int) -> Correction | None:
    """The correction of a model on ``num_gpus`` GPUs; of as like a setup as was measured.

    That is the same model on another number of GPUs, or what dense models, or models of experts,
    have in common on that GPU at that precision. None where neither was measured.
    """
    file = _file()
    gpu = file.heirs.get(gpu, gpu)
    width = precision_of(model)
    mine = [one for one in file.correction if (one.gpu, one.precision) == (gpu, width)]
    kind = "experts" if model.experts > 1 else "dense"
    found = [one for one in mine if one.model == model.name]
    found = found or [one for one in mine if one.model == kind]
    return min(found, key=lambda one: abs(np.log2(one.num_gpus / num_gpus)), default=None)


def tables(cost: IterationCost, correction: Correction) -> tuple[list[float], list[float]]:
    """Seconds and operations to add to an iteration of each of `BATCHES` sequences.

    Args:
        cost: without a correction.
        correction: ratios.
    """
    gpu = cost.gpu
    per_watt = gpu.peak_flops / gpu.tensor_w
    seconds, operations = [], []
    for seqs in BATCHES:
        gap_s, flops, moved = steady_state(
            cost, seqs, correction.prompt_tokens, correction.output_tokens
        )
        added_s = (correction.at(correction.gap, seqs) - 1.0) * gap_s
        added_s = max(added_s, (_LEAST - 1.0) * cost.base_s(seqs, 0, 0, 0, 1.0))
        gap_s += added_s
        watts = steady_w(cost, gap_s, flops, moved)
        wanted = min(correction.at(correction.power, seqs) * watts, gpu.power_limit_default_w)
        seconds.append(added_s)
        operations.append((wanted - watts) * gap_s * per_watt)
    return seconds, operations


def steady_state(
    cost: IterationCost, seqs: float, prompt_tokens: float, output_tokens: float, tiles: int = 0
) -> tuple[float, float, float]:
    """Mean seconds, operations and bytes of an iteration, with users who always come back.

    Each sequence is at half of its output in the mean, and one in ``output_tokens`` is new.

    Args:
        cost: what iterations cost.
        seqs: sequences in the batch, in the mean.
        prompt_tokens, output_tokens: of each.
        tiles: encoder tiles of each.
    """
    whole, prompt = max(1, round(seqs)), round(prompt_tokens)
    starts, pairs = seqs / output_tokens, 0.5 * prompt * prompt
    context = seqs * (prompt_tokens + output_tokens / 2)
    shape, joined = (whole, 0, 0, 0), (whole, prompt, 1, tiles)
    total_s = cost.base_s(*shape, 1.0) + context * cost.per_context_token_s(1.0)
    total_s += starts * (
        cost.base_s(*joined, 1.0) - cost.base_s(*shape, 1.0) + pairs * cost.per_pair_s(1.0)
    )
    flops = cost.base_flops(*shape) + context * cost.flops_per_context_token
    flops += starts * (cost.base_flops(0, prompt, 1, tiles) + pairs * cost.flops_per_pair)
    moved = cost.base_bytes(*shape) + context * cost.bytes_per_context_token
    return total_s, flops, moved


def steady_w(cost: IterationCost, gap_s: float, flops: float, moved: float) -> float:
    """Watts of a GPU that is always busy with this work, whatever the limit."""
    gpu = cost.gpu
    tensor, hbm = flops / gap_s / gpu.peak_flops, moved / gap_s / gpu.hbm_bytes_per_s
    return gpu.idle_w + gpu.busy_w + gpu.tensor_w * tensor + gpu.hbm_w * hbm
