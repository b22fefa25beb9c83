"""Fits what belongs to serving: engine overheads, power of saturated GPUs, pooled effects.

    python -m testbed.analysis.fitting_serving --data DIR --date DATE

adds to `fidelity_data/folds.json` and `fidelity_data/pooled.json`, and writes power constants into
the profiles. Run it after `testbed.analysis.fitting`, whose kernels it builds on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.optimize import least_squares

from emulators.corrections import BATCHES, Correction, precision_of, steady_state, steady_w
from emulators.kernels import reduce_s
from emulators.models import available_models, load_model
from emulators.profiles import load_gpu
from emulators.timing import IterationCost, Stack
from testbed.analysis import pooling, serving_power, silicon
from testbed.analysis.fitting import error_text, rounded, set_constant
from testbed.analysis.measured import (
    FOLDS,
    Columns,
    card_for,
    find,
    fold_of,
    keys,
    need,
    size,
    take,
)


class Law(NamedTuple):
    """A formula with a few constants: how to predict from columns, and where to begin."""

    names: tuple[str, ...]
    start: tuple[float, ...]
    predict: Callable[[Any, Columns], Any]
    loss: float = 0.05

    def fit(self, columns: Columns, measured: Any) -> Any:
        """Constants for these rows, all positive; residuals of logs, soft L1 loss."""

        def residuals(logs: Any) -> Any:
            return np.log(self.predict(np.exp(logs), columns) / measured)

        start = np.log(self.start)
        best = least_squares(
            residuals, start, bounds=(start - 6, start + 6), loss="soft_l1", f_scale=self.loss
        )
        return np.exp(best.x)

    def fit_folds(self, columns: Columns, measured: Any, configuration: Any) -> list[list[float]]:
        """All-rows constants first, then those without each fold."""
        fits = [self.fit(columns, measured).tolist()]
        folds = fold_of(configuration)
        for fold in range(FOLDS):
            rest = folds != fold
            enough = rest.sum() > 2 * len(self.start)
            fits.append(
                self.fit(take(columns, rest), measured[rest]).tolist() if enough else fits[0]
            )
        return fits

    def predict_out(self, fits: list[list[float]], columns: Columns, configuration: Any) -> Any:
        """Each row with the constants of its own fold."""
        folds = fold_of(configuration)
        out = np.zeros(size(columns))
        for fold in np.unique(folds):
            rows = folds == fold
            out[rows] = self.predict(np.array(fits[fold + 1]), take(columns, rows))
        return out


# Splitwise: an engine of 2023, without CUDA graphs, bound by launches where kernels are short.

SPLITWISE_GPUS = {"a100-80gb": "a100-80gb", "h100-80gb": "h100-sxm"}
SPLITWISE_POINT = ["model", "hardware", "tensor_parallel", "prompt_size", "batch_size",
                   "token_size"]  # fmt: skip


def splitwise(data: Path) -> Columns | None:
    """Rows with the kernel times of their prompt and token phases.

    Left out: the `pcap` rows, which are multiples of others and no measurement; models and GPUs
    that are not known; batches whose KV cache does not fit beside the weights, which the engine
    cannot have run as one batch.
    """
    columns = find(data / "splitwise_perf", "perf_model")
    if columns is None:
        return None
    need(columns, [*SPLITWISE_POINT, "prompt_time", "token_time"], "splitwise_perf/perf_model")
    rows, extra = [], []
    for row in range(size(columns)):
        gpu = SPLITWISE_GPUS.get(columns["hardware"][row])
        card = card_for(columns["model"][row])
        if gpu is None or card is None:
            continue
        tp = int(columns["tensor_parallel"][row])
        model, profile = load_model(card), load_gpu(gpu)
        cost = IterationCost(model, profile, tp=tp, stack=Stack(0.0, 0.0))
        prompt, batch = int(columns["prompt_size"][row]), int(columns["batch_size"][row])
        output = columns["token_size"][row]
        if cost.kv_blocks() * 16 < batch * (prompt + output):
            continue
        tokens = prompt * batch
        pairs = batch * prompt * (prompt + 1) / 2
        whole = cost.base_s(0, tokens, batch, 0, 1.0) + pairs * cost.per_pair_s(1.0)
        reduce = 2 * model.layers * float(reduce_s(profile.reduce, 2.0 * model.hidden * tokens, tp))
        token = cost.base_s(batch, 0, 0, 0, 1.0)
        context = batch * (prompt + output / 2)
        token += context * cost.per_context_token_s(1.0)
        flops = cost.base_flops(batch, 0, 0, 0) + context * cost.flops_per_context_token
        moved = cost.base_bytes(batch, 0, 0, 0) + context * cost.bytes_per_context_token
        rows.append(row)
        extra.append(
            (
                whole - reduce,
                reduce,
                token,
                model.layers,
                tokens,
                flops,
                moved,
                float(not model.gated),
            )
        )
    if not rows:
        return None
    names = ("kernels_s", "reduce_s", "token_s", "layers", "tokens", "flops", "bytes", "ungated")
    added = dict(zip(names, np.array(extra, float).T, strict=True))
    return {**take(columns, np.array(rows)), **added}


def _prompt_s(c: Any, q: Columns) -> Any:
    scale, reduce, launch, seq, large = c
    work = scale * q["kernels_s"] + reduce * q["reduce_s"]
    beyond = np.maximum(q["tokens"] - 2048, 0) / 8192
    work = (work**4 + (launch * q["layers"]) ** 4) ** 0.25
    return work * (1 + large * beyond / (1 + q["tokens"] / 8192)) + seq * q["batch_size"]


def _token_s(c: Any, q: Columns) -> Any:
    launch, scale, seq, ungated = c
    # Ungated models of that time (BLOOM) launch biases and activations one by one.
    launches = launch * q["layers"] * (1 + ungated * q["ungated"])
    work = ((scale * q["token_s"]) ** 3 + launches**3) ** (1 / 3)
    return work + seq * q["batch_size"]


PROMPT_LAW = Law(
    ("kernel_scale", "reduce_scale", "launch_layer_s", "seq_s", "large_batch"),
    (1.0, 1.3, 6e-4, 1e-3, 0.3), _prompt_s,
)  # fmt: skip
TOKEN_LAW = Law(("launch_layer_s", "kernel_scale", "seq_s", "ungated"), (4e-4, 1.0, 3e-4, 0.3),
                _token_s)  # fmt: skip


def _splitwise_power(c: Any, q: Columns) -> Any:
    busy, tensor, hbm = c
    gpu = load_gpu("a100-80gb")
    spent = q["measured_token_s"]
    share = np.minimum(1.0, q["token_s"] / spent)
    return (
        gpu.idle_w + busy * share + tensor * q["flops"] / spent / gpu.peak_flops
        + hbm * q["bytes"] / spent / gpu.hbm_bytes_per_s
    )  # fmt: skip


POWER_LAW = Law(("busy_w", "tensor_w", "hbm_w"), (100.0, 400.0, 150.0), _splitwise_power)


def fit_splitwise(data: Path) -> dict[str, Any]:
    """Constants per hardware and phase."""
    out: dict[str, Any] = {}
    columns = splitwise(data)
    if columns is None:
        return out
    for hardware in SPLITWISE_GPUS:
        mine = take(columns, columns["hardware"] == hardware)
        point = keys(mine, SPLITWISE_POINT)
        for name, law, time in (
            ("prompt", PROMPT_LAW, "prompt_time"), ("token", TOKEN_LAW, "token_time"),
        ):  # fmt: skip
            measured = mine[time] / 1e3
            fits = law.fit_folds(mine, measured, point)
            predicted = law.predict_out(fits, mine, point)
            print(hardware, name, np.round(fits[0], 6), error_text(predicted, measured))
            out[f"splitwise/{hardware}/{name}"] = fits
    powered = (columns["average_power"] > 0) & (columns["prompt_size"] <= 1024)
    mine = take(columns, powered & (columns["batch_size"] <= 16))
    if size(mine):
        mine["measured_token_s"] = mine["token_time"] / 1e3
        measured = mine["average_power"] * 400.0
        point = keys(mine, SPLITWISE_POINT)
        fits = POWER_LAW.fit_folds(mine, measured, point)
        predicted = POWER_LAW.predict_out(fits, mine, point)
        print("a100 power", np.round(fits[0], 1), error_text(predicted, measured))
        out["splitwise/a100-80gb/power"] = fits
    return out


# ML.ENERGY: token gap and power of saturated serving.


def _gap(c: Any, q: Columns) -> Any:
    scale, iteration, seq = c
    return scale * q["kernel_s"] + iteration + seq * q["avg_batch_size"]


GAP_LAW = Law(("kernel_scale", "iteration_s", "seq_s"), (1.0, 1e-3, 2e-5), _gap, 0.1)


def formula(gpu_name: str) -> Law:
    """The emulator's power formula on one GPU as a law: busy, memory and decode watts."""
    gpu = load_gpu(gpu_name)

    def predict(c: Any, q: Columns) -> Any:
        watts = serving_power.Watts(c[0], least_hbm_w(gpu_name) + c[1], c[2], c[3])
        return serving_power.formula_w(gpu, watts, q)

    return Law(("busy_w", "more_hbm_w", "decode_w", "sample_w"),
               (0.3 * gpu.power_limit_max_w, 50.0, 1e4, 5e4), predict)  # fmt: skip


def least_hbm_w(gpu_name: str) -> float:
    """Memory power that kernels alone show: 0.2 of the limit at full bandwidth.

    Serving rows of one GPU hardly vary in bandwidth, so they cannot tell it from standing power.
    """
    return 0.2 * load_gpu(gpu_name).power_limit_max_w


def text_dense(columns: Columns) -> Any:
    """Rows of dense models on text: those whose kernels a card describes in full."""
    return (columns["images"] == 0) & (columns["experts"] == 0)


_SOURCE = "ML.ENERGY v3 (ml-energy/leaderboard 0cd52da), dense models on text, fitted with tensor_w"


def fit_energy(data: Path, profiles: Path, date: str) -> dict[str, Any]:
    """Token gap and formula constants per GPU model; writes the latter into profiles."""
    columns = serving_power.energy_rows(data)
    out: dict[str, Any] = {}
    if columns is None:
        return out
    for label, gpu in (("H100", "h100-sxm"), ("B200", "b200-sxm")):
        mine = take(columns, columns["gpu_model"] == label)
        configuration = keys(mine, serving_power.CONFIGURATION)
        measured = mine["avg_batch_size"] / mine["output_throughput_tokens_per_sec"]
        fits = GAP_LAW.fit_folds(mine, measured, configuration)
        predicted = GAP_LAW.predict_out(fits, mine, configuration)
        print(label, "gap", np.round(fits[0], 6), error_text(predicted, measured))
        out[f"ml_energy_v3/{gpu}/gap"] = fits
        if gpu == "h100-sxm":
            # The engine is the same on every GPU; B200 rows show stalls that are not the engine's.
            note = (
                "host time beside kernels in ML.ENERGY v3 on H100 (vLLM of 2025), by time per "
                "token over batch; newer engines hide more of it"
            )
            for path in sorted(profiles.glob("*.toml")):
                set_constant(path, "host_iteration_s", fits[0][1], note, date, "")
                set_constant(path, "host_seq_s", fits[0][2], note, date, "")

        dense = take(mine, text_dense(mine))
        law = formula(gpu)
        models = np.array([card_for(one) for one in dense["model_id"]], dtype=object)
        measured = dense["avg_power_watts"] / dense["num_gpus"]
        fits = law.fit_folds(dense, measured, models)
        predicted = law.predict_out(fits, dense, models)
        error = error_text(predicted, measured).replace("configuration", "model")
        print(label, "power", np.round(fits[0], 1), error)
        out[f"ml_energy_v3/{gpu}/power"] = fits
        busy_w, hbm_w, decode_w, sample_w = fits[0]
        hbm_w += least_hbm_w(gpu)
        decode, sample = (
            serving_power.operations(load_gpu(gpu), watts) for watts in (decode_w, sample_w)
        )
        heirs = [gpu, "h200-sxm"] if gpu == "h100-sxm" else [gpu]
        for heir in heirs:
            note = _SOURCE if heir == gpu else f"as on {gpu}; {_SOURCE}"
            path = profiles / f"{heir}.toml"
            for name, value in (
                ("busy_w", busy_w), ("hbm_w", hbm_w), ("decode_ops", decode),
                ("sample_ops", sample),
            ):  # fmt: skip
                set_constant(path, name, value, note, date, error if heir == gpu else "")
    return out


def _means(ratios: list[list[float]]) -> list[float]:
    return [float(np.exp(np.mean(np.log(row)))) for row in ratios]


def fit_pools(data: Path, folder: Path) -> None:
    """Hyperparameters of `pooling.Pool` by marginal likelihood; writes pooled.json."""
    best: dict[str, pooling.Pooled] = {}
    energy = serving_power.energy_rows(data)
    if energy is not None:
        for name, one in serving_power.QUANTITIES.items():
            rows, logs = one.rows(energy), one.logs(energy)
            best[name] = pooling.fit(rows, logs, serving_power.EFFECTS, serving_power.COURSES)
            _report(name, rows, logs, best[name], ("point", "configuration", "pair"))
    older = serving_power.older_rows(data)
    if older is not None:
        rows, logs = serving_power.OLDER.rows(older), serving_power.OLDER.logs(older)
        pooled = pooling.fit(rows, logs, serving_power.EFFECTS, serving_power.COURSES)
        best["power_v2"] = pooled
        _report("power_v2", rows, logs, pooled, ("point", "configuration", "pair"))
    served = silicon.served_rows(data)
    if served is not None:
        served = served.below_saturation()
        for name, (most, steps) in _SILICON_FIT.items():
            rows, logs = served.rows(), served.logs(name)
            best[name] = pooling.fit(
                rows, logs, silicon.EFFECTS, silicon.COURSES, most=most, steps=steps
            )
            _report(name, rows, logs, best[name], ("point", "configuration", "family"))
    tree = rounded(msgspec.to_builtins(best))
    (folder / "pooled.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(tree), indent=1) + b"\n"
    )


_SILICON_FIT = {"ttft": (900, 16), "tpot": (450, 12)}
"""Rows and steps of the search: the work grows with the cube of the rows. TPOT gains nothing from
more of them where whole families are left out."""


def _report(
    name: str, rows: pooling.Rows, logs: Any, pooled: pooling.Pooled, levels: tuple[str, ...]
) -> None:
    pool = pooling.Pool(rows, logs, pooled)
    for level in levels:
        off = np.abs(np.exp(pool.predict(rows, level) - logs) - 1)
        print(f"{name:6s} {level} left out: APE median {np.median(off):.1%}, mean {off.mean():.1%}")


# What the emulator takes over: `emulators/corrections.toml`.

_TASKS = ("lm-arena-chat", "sourcegraph-fim", "gpqa")
"""Tasks that corrections are learnt from, the first that a model was measured with. Image tasks
include waiting for images, which the engine models by itself."""
_LEAST_PARAMS = 2e9
"""Models far below those measured take what models of their kind share."""
HEIRS = {"h200-sxm": "h100-sxm"}
"""GPUs that were not measured, and those that they are most like."""


def fit_corrections(folder: Path, path: Path, date: str) -> None:
    """Ratios of measured to computed gap and power over batch sizes, for each model and GPU."""
    pools = serving_power.pools(folder)
    columns = serving_power.energy_rows(folder)
    if columns is None:
        return
    card = np.array([card_for(one) for one in columns["model_id"]], dtype=object)
    precision = np.array([_precision(columns, row) for row in range(size(columns))], dtype=object)
    families = keys({**columns, "card": card, "precision": precision},
                    ["gpu_model", "card", "precision", "num_gpus"])  # fmt: skip
    out: list[Correction] = []
    for family in sorted(set(families)):
        rows = families == family
        task = next((one for one in _TASKS if (columns["task"][rows] == one).any()), None)
        if task is not None:
            mine = take(columns, rows & (columns["task"] == task))
            out.append(_correction(mine, pools, date))
    found = list(out)
    for name in available_models():
        if load_model(name).params < _LEAST_PARAMS:
            continue
        for label in ("H100", "B200"):
            alike = _alike(name, label, pools, date)
            mine_too = [one for one in found if (one.model, one.gpu) == (name, alike.gpu)]
            if not any(one.precision == alike.precision for one in mine_too):
                out.append(alike)
    out += _in_common(found, date)
    lines = ["# Written by testbed.analysis.fitting_serving; see emulators/corrections.py.", ""]
    lines += ["[heirs]", *(f"{name} = {json.dumps(like)}" for name, like in HEIRS.items())]
    for one in out:
        # JSON's strings, numbers and lists are TOML's.
        entries = msgspec.to_builtins(one).items()
        lines += ["", "[[correction]]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in entries]
    path.write_text("\n".join(lines) + "\n")


def _precision(columns: Columns, row: int) -> str:
    cost = serving_power.cost_of({name: values[row] for name, values in columns.items()})
    return precision_of(cost.model)


def _correction(mine: Columns, pools: dict[str, pooling.Pool], date: str) -> Correction:
    """Of rows of one model, GPU, precision and number of GPUs, on one task."""
    first = {name: values[0] for name, values in mine.items()}
    # Where the same card was measured under two names, their mean.
    names = sorted(set(mine["model_id"]))
    asked = serving_power.asked_batch(mine)
    batches = [size_of for size_of in BATCHES if asked.min() <= size_of <= asked.max()]
    batches = batches or [BATCHES[int(np.argmin(np.abs(np.log(np.array(BATCHES) / asked.min()))))]]
    output = float(np.median(mine["avg_output_len"]))
    gap, power = [], []
    for batch in batches:
        ratios = [_ratios({**first, "model_id": name}, batch, output, pools) for name in names]
        gap.append(float(np.exp(np.mean([np.log(one[0]) for one in ratios]))))
        power.append(float(np.exp(np.mean([np.log(one[1]) for one in ratios]))))
    off = {
        name: np.abs(one.predict(pools[name], mine, "point") / one.measured(mine) - 1).mean()
        for name, one in serving_power.QUANTITIES.items()
    }
    return Correction(
        gpu=serving_power.GPUS[first["gpu_model"]], model=card_for(first["model_id"]) or "",
        precision=precision_of(serving_power.cost_of(first).model), num_gpus=int(first["num_gpus"]),
        prompt_tokens=serving_power.PROMPT_TOKENS[first["task"]], output_tokens=round(output),
        batch=batches, gap=rounded(gap), power=rounded(power),
        source=f"ML.ENERGY v3 (ml-energy/leaderboard 0cd52da), {first['task']}, pooled",
        date=date,
        error=f"mean error at batch sizes left out: gap {off['gap']:.1%}, power {off['power']:.1%}",
    )  # fmt: skip


def _alike(name: str, label: str, pools: dict[str, pooling.Pool], date: str) -> Correction:
    """Of a model that was not measured with text on a GPU: by its shape, from all others."""
    model, gpu = load_model(name), load_gpu(serving_power.GPUS[label])
    num_gpus = next(
        (count for count in (1, 2, 4) if model.weight_bytes < 0.7 * count * gpu.memory_bytes), 8
    )
    width = precision_of(model)
    row = {
        "model_id": name, "gpu_model": label, "task": _TASKS[0], "num_gpus": float(num_gpus),
        "tensor_parallel": float(num_gpus) if model.experts == 1 else 1.0,
        "expert_parallel": float(num_gpus) if model.experts > 1 else 1.0, "data_parallel": 1.0,
        "weight_precision": {"bf16": "bfloat16", "fp8": "fp8", "4-bit": "mxfp4"}[width],
    }  # fmt: skip
    batches, output = [8, 16, 32, 64, 128, 256], 500.0
    ratios = [_ratios(row, batch, output, pools, leave="pair") for batch in batches]
    return Correction(
        gpu=gpu.name, model=name, precision=width, num_gpus=num_gpus,
        prompt_tokens=serving_power.PROMPT_TOKENS[_TASKS[0]], output_tokens=round(output),
        batch=batches, gap=rounded([one[0] for one in ratios]),
        power=rounded([one[1] for one in ratios]),
        source="not measured here with text: from models of like shape in ML.ENERGY v3, pooled",
        date=date, error="of models left out whole: see docs/fidelity.md",
    )  # fmt: skip


def _ratios(
    row: dict[str, Any], batch: int, output: float, pools: dict[str, pooling.Pool], leave: str = ""
) -> tuple[float, float]:
    """Gap and power at a batch size, pooled over computed."""
    row = {**row, "avg_batch_size": float(batch), "max_num_seqs": float(batch),
           "avg_output_len": output,
           "output_throughput_tokens_per_sec": 1.0}  # fmt: skip
    row.update(serving_power.work_of(row))
    one = _one_row(row)
    gap_s = serving_power.QUANTITIES["gap"].predict(pools["gap"], one, leave)[0]
    row["output_throughput_tokens_per_sec"] = batch / gap_s
    row.update(serving_power.work_of(row))
    one = _one_row(row)
    # As the emulator serves it: tensor-parallel throughout, with the host of the profile.
    cost = IterationCost(
        serving_power.cost_of(row).model, load_gpu(serving_power.GPUS[row["gpu_model"]]),
        tp=int(row["num_gpus"]), correct=False,
    )  # fmt: skip
    computed_s, flops, moved = steady_state(cost, batch, serving_power.prompt_of(row)[0], output)
    watts = steady_w(cost, gap_s, flops, moved)
    wanted_w = serving_power.QUANTITIES["power"].predict(pools["power"], one, leave)[0]
    return float(gap_s / computed_s), float(wanted_w / watts)


def _one_row(row: dict[str, Any]) -> Columns:
    return {
        name: np.array([value], dtype=object if isinstance(value, str) else float)
        for name, value in row.items()
    }


def _in_common(found: list[Correction], date: str) -> list[Correction]:
    """What models of a kind and precision share on each GPU: geometric means of those measured."""
    groups: dict[tuple[str, str, str], list[Correction]] = {}
    for one in found:
        kind = "experts" if load_model(one.model).experts > 1 else "dense"
        groups.setdefault((one.gpu, kind, one.precision), []).append(one)
    batches = [size_of for size_of in BATCHES if 8 <= size_of <= 512]
    out = []
    for (gpu, kind, precision), mine in sorted(groups.items()):
        gap = _means([[one.at(one.gap, size_of) for one in mine] for size_of in batches])
        power = _means([[one.at(one.power, size_of) for one in mine] for size_of in batches])
        spread = np.std([np.log(one.at(one.power, 64)) for one in mine])
        out.append(
            Correction(
                gpu=gpu, model=kind, precision=precision, num_gpus=1,
                prompt_tokens=round(np.median([one.prompt_tokens for one in mine])),
                output_tokens=round(np.median([one.output_tokens for one in mine])),
                batch=batches, gap=rounded(gap), power=rounded(power),
                source=f"geometric mean of {len(mine)} models and numbers of GPUs", date=date,
                error=f"standard deviation among them at batch 64: power {spread:.0%}",
            )
        )  # fmt: skip
    return out


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--date", required=True, help="to write beside the constants")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    folder = Path(__file__).parent / "fidelity_data"
    path = folder / "folds.json"
    folds = json.loads(path.read_text())
    folds.update(fit_splitwise(arguments.data))
    folds.update(fit_energy(arguments.data, root / "emulators" / "profiles", arguments.date))
    path.write_text(json.dumps(rounded(folds), indent=0, sort_keys=True) + "\n")
    fit_pools(arguments.data, folder)
    fit_corrections(folder, root / "emulators" / "corrections.toml", arguments.date)


if __name__ == "__main__":
    main()
