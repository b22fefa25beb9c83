"""How far the emulated physics is from measured hardware: `testbed fidelity`.

For each measured set that a folder holds, each quantity is predicted and compared row by row with
what was measured; beside it stand naive alternatives, so that an error can be judged. Constants
come from fits that have not seen the row's configuration (`testbed.analysis.measured.fold_of`):
that holds for rows that were there when constants were fitted and for rows that were not. Nothing
is looked up by row, and nothing is fitted here.

>>> rows = evaluate(None, sets=("mlperf_power",))
>>> sorted(rows[0])[:4]
['ape_mean_frac', 'ape_median_frac', 'ape_p90_frac', 'bias_frac']
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from emulators.models import load_model
from emulators.power import clock_for_limit
from emulators.profiles import load_gpu
from emulators.timing import IterationCost, Stack
from testbed.analysis import serving_power, silicon
from testbed.analysis.fitting import KERNELS, VLLM_MODELS, Kernel, Sample, predict_out
from testbed.analysis.fitting_serving import (
    GAP_LAW,
    POWER_LAW,
    PROMPT_LAW,
    SPLITWISE_GPUS,
    SPLITWISE_POINT,
    TOKEN_LAW,
    formula,
    splitwise,
    text_dense,
)
from testbed.analysis.measured import (
    Columns,
    card_for,
    find,
    fold_of,
    keys,
    need,
    size,
    take,
)
from testbed.core.errors import SpecError

SHIPPED = Path(__file__).parent / "fidelity_data"
"""The measured rows that come with the package."""


class Comparison(NamedTuple):
    """One quantity of one set, predicted and measured, row by row."""

    set: str
    gpu: str
    model: str
    quantity: str
    predicted: Any
    measured: Any
    naive: dict[str, Any]
    """Alternative predictions of the same rows."""
    differences: bool = False
    """Errors are differences in the quantity's own unit, not shares of what was measured."""

    def row(self) -> dict[str, Any]:
        """The entry of ``testbed fidelity --json``."""
        return {
            "set": self.set,
            "gpu": self.gpu,
            "model": self.model,
            "quantity": self.quantity,
            "rows": len(self.measured),
            **_errors(self.predicted, self.measured, self.differences),
            "naive": {
                name: _errors(values, self.measured, self.differences)
                for name, values in self.naive.items()
            },
        }


def _errors(predicted: Any, measured: Any, differences: bool) -> dict[str, float | None]:
    usable = np.isfinite(predicted) & np.isfinite(measured)
    if not usable.any():
        return dict.fromkeys(("ape_median_frac", "ape_mean_frac", "ape_p90_frac", "bias_frac"))
    off = predicted[usable] - measured[usable]
    if not differences:
        off = off / measured[usable]
    size_of = np.abs(off)
    return {
        "ape_median_frac": float(np.median(size_of)),
        "ape_mean_frac": float(size_of.mean()),
        "ape_p90_frac": float(np.quantile(size_of, 0.9)),
        "bias_frac": float(off.mean()),
    }


@cache
def _folds() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((SHIPPED / "folds.json").read_text(encoding="utf-8"))
    return tree


# Kernels.


def _kernels(data: Path, gpus: Iterable[str], name: str) -> list[Comparison]:
    out = []
    for kernel in KERNELS:
        for gpu in gpus:
            sample = kernel.load(data, gpu)
            folds = _folds().get(f"{gpu}/{kernel.name}")
            if sample is None or folds is None or not len(sample.measured_s):
                continue
            assert kernel.kind is not None
            parts = [msgspec.convert(one, kernel.kind) for one in folds]
            predicted = predict_out(kernel, gpu, sample, parts)
            naive = {"roofline": kernel.roofline(load_gpu(gpu).chip, sample.columns)}
            naive["power_law"] = _power_law(kernel, gpu, sample)
            naive["constant"] = _constant(sample)
            quantity = f"{kernel.name}_s"
            out.append(Comparison(name, gpu, "all", quantity, predicted, sample.measured_s, naive))
    return out


def _power_law(kernel: Kernel, gpu: str, sample: Sample) -> Any:
    """Straight-line interpolation in logs of roofline time, fitted without the row's fold."""
    x = np.log(np.maximum(kernel.roofline(load_gpu(gpu).chip, sample.columns), 1e-12))
    y = np.log(sample.measured_s)
    return np.exp(_by_fold(sample.configuration, lambda rest, own: _line(x, y, rest, own)))


def _line(x: Any, y: Any, rest: Any, own: Any) -> Any:
    if rest.sum() < 3:
        return np.full(int(own.sum()), np.nan)
    design = np.column_stack([np.ones(len(x)), x, x**2])
    solution = np.linalg.lstsq(design[rest], y[rest], rcond=None)[0]
    return design[own] @ solution


def _constant(sample: Sample) -> Any:
    y = sample.measured_s
    return _by_fold(
        sample.configuration,
        lambda rest, own: np.full(int(own.sum()), np.median(y[rest]) if rest.any() else np.nan),
    )


def _by_fold(configuration: Any, predict: Callable[[Any, Any], Any]) -> Any:
    folds = fold_of(configuration)
    out = np.full(len(folds), np.nan)
    for fold in np.unique(folds):
        own = folds == fold
        out[own] = predict(~own, own)
    return out


def _aiconfigurator(data: Path) -> list[Comparison]:
    gpus = ("a100-80gb", "h100-sxm", "h200-sxm")
    return _kernels(data, gpus, "gpu_kernels_aiconfigurator")


def _vllm_kernels(data: Path) -> list[Comparison]:
    gpus = ("rtx-4090", "rtx-pro-6000")
    return _kernels(data, gpus, "vllm_kernel_profiles") + _mixed(data)


def _mixed(data: Path) -> list[Comparison]:
    """The reduction to a closed form, on mixed batches of whole layers' attention.

    Predicted by what the engine sums: linear in context and pairs.
    """
    columns = find(data / "vllm_kernel_profiles", "attention")
    if columns is None:
        return []
    out = []
    names = {"RTX4090": "rtx-4090", "RTXPRO6000": "rtx-pro-6000"}
    for label, gpu in names.items():
        for model, card in VLLM_MODELS.items():
            own = (columns["gpu"] == label) & (columns["model"] == model)
            own &= (columns["prefill_chunk"] >= 256) & (columns["n_decode"] >= 8)
            mine = take(columns, own)
            if not size(mine):
                continue
            predicted, pure = np.zeros(size(mine)), np.zeros(size(mine))
            for tp in np.unique(mine["tp"]):
                rows = mine["tp"] == tp
                cost = IterationCost(
                    load_model(card), load_gpu(gpu), tp=int(tp), stack=Stack(0.0, 0.0)
                )
                part = take(mine, rows)
                predicted[rows], pure[rows] = _attention_linear(cost, part)
            measured = mine["time_us"] / 1e6
            out.append(
                Comparison("vllm_kernel_profiles", gpu, card, "mixed_attention_closed_form_s",
                           predicted, measured, {"decodes_as_when_alone": pure})
            )  # fmt: skip
    return out


def _attention_linear(cost: IterationCost, c: Columns) -> tuple[Any, Any]:
    """Attention of one layer as the closed form has it, and with decodes at their pure cost."""
    layers = cost.model.num_attention_layers
    chunk, before, seqs = c["prefill_chunk"], c["kv_prefill"], c["n_decode"]
    context = seqs * c["kv_decode"]
    pairs = chunk * before + chunk * (chunk + 1) / 2
    fixed = np.array(
        [cost.attention_base_s(int(n), int(p)) for n, p in zip(seqs, chunk, strict=True)]
    )
    prefill = fixed + cost.per_pair_s(1.0) * pairs
    mixed = prefill + cost.per_context_token_mixed_s(1.0) * context
    pure = prefill + cost.per_context_token_s(1.0) * context
    return mixed / layers, pure / layers


_VIDUR_GPUS = {"a100": "a100-80gb", "h100": "h100-sxm"}


def _vidur(data: Path) -> list[Comparison]:
    """Linear layers of an older framework, by kernels fitted on another set: do they transfer?"""
    columns = find(data / "vidur_profiles", "mlp")
    if columns is None:
        return []
    need(columns, ["gpu", "model", "num_tokens", "num_tensor_parallel_workers"], "vidur mlp")
    layers = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    out = []
    for label, gpu_name in _VIDUR_GPUS.items():
        gpu = load_gpu(gpu_name)
        kernel = next(one for one in KERNELS if one.name == "gemm_bf16")
        folds = [msgspec.convert(one, kernel.kind) for one in _folds()[f"{gpu_name}/gemm_bf16"]]
        mine = take(columns, columns["gpu"] == label)
        if not size(mine):
            continue
        tp = mine["num_tensor_parallel_workers"]
        heads, kv_heads = mine["n_head"] / tp, np.maximum(mine["n_kv_head"] / tp, 1.0)
        width = mine["n_embd"] / mine["n_head"]
        up = np.array([2.0 if _true(value) else 1.0 for value in mine["use_gated_mlp"]])
        shapes = {
            "attn_pre_proj": ((heads + 2 * kv_heads) * width, mine["n_embd"]),
            "attn_post_proj": (mine["n_embd"], heads * width),
            "mlp_up_proj": (up * mine["n_expanded_embd"] / tp, mine["n_embd"]),
            "mlp_down_proj": (mine["n_embd"], mine["n_expanded_embd"] / tp),
        }
        predicted, measured, roof = [], [], []
        for layer in layers:
            n, k = shapes[layer]
            table = {"m": mine["num_tokens"], "n": n, "k": k}
            time_s = mine.get(f"ms_{layer}.median")
            if time_s is None:
                continue
            usable = np.isfinite(time_s) & (time_s > 0)
            part = take(table, usable)
            predicted.append(kernel.predict(folds[0], gpu.chip, part))
            roof.append(kernel.roofline(gpu.chip, part))
            measured.append(time_s[usable] / 1e3)
        out.append(
            Comparison("vidur_profiles", gpu_name, "all", "linear_layer_s",
                       np.concatenate(predicted), np.concatenate(measured),
                       {"roofline": np.concatenate(roof)})
        )  # fmt: skip
    return out


def _true(value: Any) -> bool:
    return value in (True, 1.0, "true", "True")


# Serving.


def _splitwise(data: Path) -> list[Comparison]:
    columns = splitwise(data)
    if columns is None:
        return []
    out = []
    point = keys(columns, SPLITWISE_POINT)
    for name, law, column in (
        ("prompt", PROMPT_LAW, "prompt_time"), ("token", TOKEN_LAW, "token_time"),
    ):  # fmt: skip
        for hardware, gpu in SPLITWISE_GPUS.items():
            own = columns["hardware"] == hardware
            if not own.any():
                continue
            mine = take(columns, own)
            measured = mine[column] / 1e3
            predicted = law.predict_out(_folds()[f"splitwise/{hardware}/{name}"], mine, point[own])
            kernel_s = mine["kernels_s"] + mine["reduce_s"] if name == "prompt" else mine["token_s"]
            naive = {"kernel_sum": kernel_s}
            naive["constant"] = _constant(Sample(mine, measured, point[own]))
            model = "|".join(sorted(set(mine["model"])))
            out.append(
                Comparison("splitwise_perf", gpu, model, f"{name}_s", predicted, measured, naive)
            )
    powered = (columns["average_power"] > 0) & (columns["prompt_size"] <= 1024)
    powered &= columns["batch_size"] <= 16
    if powered.any():
        mine = take(columns, powered)
        mine["measured_token_s"] = mine["token_time"] / 1e3
        measured = mine["average_power"] * load_gpu("a100-80gb").power_limit_max_w
        fits = _folds()["splitwise/a100-80gb/power"]
        predicted = POWER_LAW.predict_out(fits, mine, point[powered])
        naive = {"constant": _constant(Sample(mine, measured, point[powered]))}
        out.append(
            Comparison("splitwise_perf", "a100-80gb", "all", "power_w", predicted, measured, naive)
        )
    return out


def _silicon(data: Path) -> list[Comparison]:
    """Closed-loop benchmarks: the engine's queue, and what engines and harnesses do beside it."""
    served = silicon.served_rows(data)
    if served is None:
        return []
    pools, rows = silicon.pools(SHIPPED), served.rows()
    table_s = np.array([_kernel_sum(setup) for setup in served.setups])
    names = [f"{setup.gpu}|{setup.backend}" for setup in served.setups]
    out = []
    for name, column in (("ttft", 0), ("tpot", 1)):
        measured, queue_s = served.measured[:, column], served.computed(name)
        naive = {
            "queue_alone": queue_s,
            "kernel_table_without_queue": table_s[:, column],
            "another_run_of_the_same_setup": _repeats(served.setups, measured),
        }
        for level, suffix in _SILICON_LEVELS.items():
            predicted = queue_s * np.exp(pools[name].predict(rows, level))
            for group in [*sorted(set(names)), "all|all"]:
                if level != "point" and group != "all|all":
                    continue
                own = np.array([group in ("all|all", one) for one in names])
                gpu, backend = group.split("|")
                for which, ending in ((~served.saturated, ""), (served.saturated, "_saturated")):
                    chosen = own & which
                    if not chosen.any() or (ending and (gpu != "all" or suffix)):
                        continue
                    some = {key: values[chosen] for key, values in naive.items()}
                    quantity = f"{name}_s{suffix}{ending}"
                    out.append(
                        Comparison("llm_e2e_silicon", gpu, backend, quantity, predicted[chosen],
                                   measured[chosen], some)
                    )  # fmt: skip
    return out


_SILICON_LEVELS = {
    "point": "",
    "configuration": "_configuration_not_seen",
    "family": "_model_not_seen_on_gpu_and_engine",
}


def _kernel_sum(setup: silicon.Setup) -> tuple[float, float]:
    """TTFT and TPOT of a table of kernel times: one prompt's prefill, one iteration's decode."""
    cost = IterationCost(
        load_model(setup.model), load_gpu(setup.gpu), tp=setup.num_gpus,
        ep=setup.num_gpus if setup.expert_parallel else 1, precision=setup.precision,
        stack=Stack(0.0, 0.0),
    )  # fmt: skip
    prompt, users = setup.prompt_tokens, setup.concurrency
    pairs = 0.5 * prompt * prompt
    first = cost.base_s(0, prompt, 1, 0, 1.0) + pairs * cost.per_pair_s(1.0)
    context = users * (prompt + setup.output_tokens / 2)
    each = cost.base_s(users, 0, 0, 0, 1.0) + context * cost.per_context_token_s(1.0)
    return first, each


def _repeats(setups: list[silicon.Setup], measured: Any) -> Any:
    """The median of other measurements of the very same setup; NaN where there is none.

    It bounds what any prediction from the stated configuration can reach.
    """
    groups: dict[silicon.Setup, list[int]] = {}
    for row, setup in enumerate(setups):
        groups.setdefault(setup, []).append(row)
    out = np.full(len(measured), np.nan)
    for rows in groups.values():
        # Dumps repeat each other: only distinct values are other runs.
        distinct = np.unique(measured[rows])
        for row in rows:
            others = distinct[np.abs(distinct / measured[row] - 1) > 1e-6]
            if len(others):
                out[row] = np.median(others)
    return out


def _runs(data: Path) -> list[Comparison]:
    out = []
    for run in silicon.runs(data):
        label = f"{run.model}" + (f" tp{run.tp}" if run.tp > 1 else "")
        for quantity, predicted, measured in (
            ("ttft_s", run.predicted_ttft_s, run.ttft_s),
            ("tpot_s", run.predicted_tpot_s, run.tpot_s),
        ):
            naive = {"constant": np.full(len(measured), np.median(measured))}
            out.append(
                Comparison("vllm_runs", run.gpu, label, quantity, predicted, measured, naive)
            )
            out.append(
                Comparison("vllm_runs", run.gpu, label, f"mean_{quantity}",
                           np.array([predicted.mean()]), np.array([measured.mean()]), {})
            )  # fmt: skip
    return out


# Power.


def _energy_v3(data: Path) -> list[Comparison]:
    """Power and token gap of saturated serving, by what the emulator runs.

    Each is predicted without the row's point (its batch size of its configuration), and again
    without its configuration and without its model on this GPU. Power is predicted at the measured
    token rate, and at the rate that the emulator itself comes to.
    """
    columns = serving_power.energy_rows(data)
    if columns is None:
        return []
    pools = serving_power.pools(SHIPPED)
    power, gap = (serving_power.QUANTITIES[name] for name in ("power", "gap"))
    out = []
    for label, gpu in (("H100", "h100-sxm"), ("B200", "b200-sxm")):
        own = columns["gpu_model"] == label
        if not own.any():
            continue
        mine = take(columns, own)
        watts, gap_s = power.measured(mine), gap.measured(mine)
        configuration = keys(mine, [one for one in serving_power.CONFIGURATION if one in mine])
        models = np.array([card_for(one) for one in mine["model_id"]], dtype=object)
        law_w = formula(gpu).predict_out(_folds()[f"ml_energy_v3/{gpu}/power"], mine, models)
        law_s = GAP_LAW.predict_out(_folds()[f"ml_energy_v3/{gpu}/gap"], mine, configuration)
        naive_w = {
            "formula_without_corrections": law_w,
            "constant": _constant(Sample(mine, watts, configuration)),
            "roofline": _roofline_w(gpu, mine),
            "interpolation": _interpolated(mine, watts, configuration),
        }
        naive_s = {
            "kernels_and_host": law_s,
            "kernel_sum": mine["kernel_s"],
            "interpolation": _interpolated(mine, gap_s, configuration),
        }

        def add(model: str, quantity: str, predicted: Any, measured: Any, naive: Any,
                gpu: str = gpu) -> None:  # fmt: skip
            out.append(Comparison("ml_energy_v3", gpu, model, quantity, predicted, measured, naive))

        for level, suffix in _LEVELS.items():
            ours_s = gap.predict(pools["gap"], mine, level)
            ours = _at_rate(mine, mine["avg_batch_size"] / ours_s)
            for quantity, rows in (("power_w", mine), ("power_w_at_own_rate", ours)):
                predicted = power.predict(pools["power"], rows, level)
                add("all", quantity + suffix, predicted, watts, naive_w)
            add("all", f"token_gap_s{suffix}", ours_s, gap_s, naive_s)
        dense = text_dense(mine)
        if dense.any():
            pooled = power.predict(pools["power"], mine, "pair")[dense]
            add("dense, text", "power_w_formula_without_corrections", law_w[dense], watts[dense],
                {"pooled": pooled})  # fmt: skip
    return out


_LEVELS = {
    "point": "",
    "configuration": "_configuration_not_seen",
    "pair": "_model_not_seen_on_gpu",
}
"""What of the known rows a prediction leaves out -> how its quantity is called."""


def _at_rate(columns: Columns, rate_tps: Any) -> Columns:
    """The same rows, serving at another token rate."""
    columns = {**columns, "output_throughput_tokens_per_sec": rate_tps}
    return {**columns, **serving_power.work(columns)}


def _roofline_w(gpu_name: str, columns: Columns) -> Any:
    """Idle to limit in proportion to the busier of tensor cores and memory."""
    gpu = load_gpu(gpu_name)
    share = np.minimum(1.0, np.maximum(columns["tensor_frac"], columns["hbm_frac"]))
    return gpu.idle_w + (gpu.power_limit_max_w - gpu.idle_w) * share


def _interpolated(columns: Columns, measured: Any, configuration: Any) -> Any:
    """Linear in log2 of batch between the configuration's other batches; NaN outside them."""
    x = np.log2(columns["avg_batch_size"])
    out = np.full(len(x), np.nan)
    for name in np.unique(configuration):
        rows = np.flatnonzero(configuration == name)
        rows = rows[np.argsort(x[rows])]
        for at in range(1, len(rows) - 1):
            low, high, row = rows[at - 1], rows[at + 1], rows[at]
            if x[high] > x[low]:
                part = (x[row] - x[low]) / (x[high] - x[low])
                out[row] = measured[low] + part * (measured[high] - measured[low])
    return out


def _energy_v2(data: Path) -> list[Comparison]:
    """An older engine that leaves GPUs waiting: the same formula, busy for its kernels' time."""
    columns = serving_power.older_rows(data)
    if columns is None:
        return []
    pool, quantity = serving_power.older_pool(SHIPPED), serving_power.OLDER
    out = []
    for label in sorted(set(columns["gpu_model"])):
        name = serving_power.GPUS[label]
        gpu, mine = load_gpu(name), take(columns, columns["gpu_model"] == label)
        watts = quantity.measured(mine)
        naive = {
            "formula_without_corrections": quantity.computed(mine),
            "always_busy": serving_power.formula_w(gpu, serving_power.watts_of(gpu), mine),
            "constant": np.full(len(watts), np.median(watts)),
        }
        for level, suffix in _LEVELS.items():
            predicted = quantity.predict(pool, mine, level)
            out.append(
                Comparison("ml_energy_v2", name, "all", f"power_w{suffix}", predicted, watts, naive)
            )
    return out


_MLPERF_GPUS = {"H200-SXM": "h200-sxm", "H100-PCIe": "h100-sxm", "A100-PCIe": "a100-80gb"}
_LANGUAGE = ("llama", "mixtral", "gptj", "bert", "stable-diffusion")
_UNCAPPED = 1.13
"""Demand of saturated MLPerf runs at full clock over the limit, fitted with the voltages."""
_RIDGE = 3.0
"""Pairs that an effect of a benchmark, a scenario or the depth of the cap must outweigh."""


def _mlperf(data: Path) -> list[Comparison]:
    """Throughput under a power cap, as a share of that without.

    Work is taken as bound by the clock, with a demand at full clock of `_UNCAPPED` times the limit:
    that is the emulator's part, and all there is to language models. Other benchmarks wait for
    hosts and memory, servers for their slowest requests, and capped runs have other batch sizes.
    Pairs cannot tell these from the cap, so they are effects of the benchmark, of the scenario and
    of how deep the cap is, learnt from the pairs of other GPUs or benchmarks.
    """
    columns = find(data / "mlperf_power", "power_cap_vs_full_power")
    if columns is None:
        return []
    need(columns, ["gpu", "benchmark", "scenario", "rel_cap", "rel_throughput"], "mlperf_power")
    known = find(SHIPPED / "mlperf_power", "power_cap_vs_full_power")
    assert known is not None, "shipped data are part of the package"
    alone, measured = _capped_shares(columns), columns["rel_throughput"]
    predicted = alone * np.exp(_cap_effects(columns, known))
    naive = {
        "clock_bound_work": alone,
        "proportional_to_cap": columns["rel_cap"],
        "no_effect": np.ones(len(measured)),
        "constant": np.full(len(measured), np.median(known["rel_throughput"])),
    }
    language = np.array(
        [any(part in one for part in _LANGUAGE) for one in columns["benchmark"]], bool
    )
    out = []
    for label, own in (("all", np.ones(len(measured), bool)), ("language and diffusion", language)):
        if own.any():
            some = {name: values[own] for name, values in naive.items()}
            out.append(
                Comparison("mlperf_power", "all", label, "throughput_under_cap_points",
                           predicted[own], measured[own], some, differences=True)
            )  # fmt: skip
    return out


def _capped_shares(columns: Columns) -> Any:
    shares = []
    for label, cap in zip(columns["gpu"], columns["rel_cap"], strict=True):
        gpu = next((gpu for part, gpu in _MLPERF_GPUS.items() if part in label), "h100-sxm")
        shares.append(capped_share(gpu, float(cap)))
    return np.array(shares)


def _cap_effects(columns: Columns, known: Columns) -> Any:
    """Logs of throughput over that of clock-bound work; ridge regression without a pair's kind.

    A kind is a benchmark on a GPU, in whatever scenario.
    """
    # Versions and accuracy targets of a benchmark are the same work.
    benchmark, theirs = (
        np.array([re.sub(r"(-v2)?(-99.*)?$", "", one) for one in each["benchmark"]], dtype=object)
        for each in (columns, known)
    )
    names = [*sorted(set(theirs)), *sorted(set(known["scenario"]))]

    def design(each: Columns, kinds: Any) -> Any:
        held = [(kinds == name) | (each["scenario"] == name) for name in names]
        return np.column_stack([*held, 3.0 * np.log(each["rel_cap"] / 0.63)]).astype(float)

    x, own = design(known, theirs), design(columns, benchmark)
    y = np.log(known["rel_throughput"] / _capped_shares(known))
    out = np.zeros(len(benchmark))
    for row in range(len(out)):
        rest = (theirs != benchmark[row]) | (known["gpu"] != columns["gpu"][row])
        normal = x[rest].T @ x[rest] + _RIDGE * np.eye(x.shape[1])
        out[row] = own[row] @ np.linalg.solve(normal, x[rest].T @ y[rest])
    return out


def capped_share(gpu_name: str, rel_cap: float) -> float:
    """Throughput of clock-bound work at a cap of ``rel_cap`` times the limit, over that at it.

    >>> 0.75 < capped_share("h100-sxm", 0.7) < 0.9
    True
    """
    gpu = load_gpu(gpu_name)
    limit_w = gpu.power_limit_max_w
    one = np.ones(1)
    # Operations that draw what is left of the demand beside idling and a busy chip.
    tensor = (_UNCAPPED * limit_w - gpu.idle_w - gpu.busy_w) / gpu.tensor_w
    bound = tensor / max(tensor, gpu.gemm_efficiency)
    clocks = [
        clock_for_limit(gpu, one * limit_w * cap, one * bound, one * tensor, one * 0.0, one)[0]
        for cap in (rel_cap, 1.0)
    ]
    return float(clocks[0] / clocks[1])


# Heat.

_BIOHPC_GPUS = {"A100": (300.0, "a100-80gb"), "H100": (350.0, "h100-sxm")}
_EXPONENTS = np.linspace(0.4, 2.0, 17)
_DRIFT_MONTHS = 3.0
"""Over so many months what was measured loses weight by e."""


def _biohpc(data: Path) -> list[Comparison]:
    """Hourly temperature from hourly power, one month left out at a time.

    The thermal exponent is the profile's; where we have no profile of the card it is fitted.
    Resistance and each server's offset belong to its cooling. They are fitted on the rows we ship.
    """
    columns = find(data / "biohpc_gpu_servers", "gpu_hourly")
    if columns is None:
        return []
    need(columns, _BIOHPC, "biohpc gpu_hourly")
    shipped = find(SHIPPED / "biohpc_gpu_servers", "gpu_hourly")
    assert shipped is not None, "shipped data are part of the package"
    out = []
    for part in ("A40", "A100", "H100", "A6000"):
        mine, known = _of_card(columns, part), _of_card(shipped, part)
        if not size(mine):
            continue
        limit_w, gpu_name = _BIOHPC_GPUS.get(part, (300.0, ""))
        exponents = [load_gpu(gpu_name).thermal_exponent] if gpu_name else _EXPONENTS
        measured = mine["temp_avg_c"]
        naive = {
            "straight_line": _settled(mine, known, limit_w, [1.0]),
            "constant": np.full(len(measured), np.median(known["temp_avg_c"])),
        }
        predicted = _settled(mine, known, limit_w, exponents)
        out.append(
            Comparison("biohpc_gpu_servers", gpu_name or part.lower(), part, "temperature_c",
                       predicted, measured, naive, differences=True)
        )  # fmt: skip
    return out


_BIOHPC = ["server", "gpus", "timestamp", "power_avg_w", "temp_avg_c"]


def _of_card(columns: Columns, part: str) -> Columns:
    """Usable hours of servers with such a card."""
    own = np.array([part in one for one in columns["gpus"]], bool)
    own &= np.isfinite(columns["power_avg_w"]) & np.isfinite(columns["temp_avg_c"])
    return take(columns, own)


def _settled(mine: Columns, known: Columns, limit_w: float, exponents: Any) -> Any:
    """Temperatures by offset + rise (P / limit) ** exponent, fitted without a row's month.

    Air at the inlets was not recorded, and drifts: months count by how near they are.
    """
    servers = sorted(set(known["server"]))

    def design(each: Columns, exponent: float) -> Any:
        share = (np.maximum(each["power_avg_w"], 1.0) / limit_w) ** exponent
        # A server that we do not know has the mean offset.
        held = np.array([each["server"] == name for name in servers], float).T
        held[held.sum(axis=1) == 0] = 1.0 / len(servers)
        return np.column_stack([share, held])

    def fit(rows: Columns, weight: Any, exponent: float) -> tuple[float, Any]:
        x, y = design(rows, exponent), rows["temp_avg_c"]
        root = np.sqrt(weight)
        best = np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0]
        return float(np.average(np.abs(x @ best - y), weights=weight)), best

    months, theirs = (_months(each["timestamp"]) for each in (mine, known))
    out = np.zeros(len(months))
    for month in np.unique(months):
        rest = take(known, theirs != month)
        apart = np.abs(theirs[theirs != month] - month)
        weight = np.exp(-apart / _DRIFT_MONTHS) + 0.01
        fits = [(*fit(rest, weight, exponent), exponent) for exponent in exponents]
        _, best, exponent = min(fits, key=lambda one: one[0])
        own = months == month
        out[own] = design(take(mine, own), exponent) @ best
    return out


def _months(timestamps: Any) -> Any:
    """Months since the year 0."""
    return np.array([int(str(one)[:4]) * 12 + int(str(one)[5:7]) for one in timestamps])


SETS: dict[str, Callable[[Path], list[Comparison]]] = {
    "gpu_kernels_aiconfigurator": _aiconfigurator,
    "vllm_kernel_profiles": _vllm_kernels,
    "vidur_profiles": _vidur,
    "splitwise_perf": _splitwise,
    "llm_e2e_silicon": _silicon,
    "vllm_runs": _runs,
    "ml_energy_v3": _energy_v3,
    "ml_energy_v2": _energy_v2,
    "mlperf_power": _mlperf,
    "biohpc_gpu_servers": _biohpc,
}
"""Name of a set's folder -> its comparisons."""


def compare(data: Path | None = None, sets: Iterable[str] = ()) -> list[Comparison]:
    """Compare with every set that is there.

    Args:
        data: folder of sets; the shipped one if not given.
        sets: names of `SETS` to compare with; all if empty.

    Raises:
        SpecError: the folder is missing, holds none of the sets, or a file is not as expected.
    """
    data = SHIPPED if data is None else data
    if not data.is_dir():
        raise SpecError(f"fidelity data {data}: no such folder")
    wanted = list(sets) or list(SETS)
    unknown = [name for name in wanted if name not in SETS]
    if unknown:
        raise SpecError(
            f"fidelity: no set called {', '.join(unknown)}; there are {', '.join(SETS)}"
        )
    out: list[Comparison] = []
    for name in wanted:
        if (data / name).is_dir():
            out += SETS[name](data)
    if not out:
        raise SpecError(
            f"fidelity data {data}: no row of {', '.join(wanted)} that can be compared is there"
        )
    return out


def evaluate(data: Path | None = None, sets: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The list that ``testbed fidelity --json`` prints; see `compare`.

    Errors of quantities that end in ``_points`` or ``_c`` are differences in those units.
    """
    return [comparison.row() for comparison in compare(data, sets)]
