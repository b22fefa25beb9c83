"""Rows of `llm_e2e_silicon` and `vllm_runs`, served by the emulated engine.

A row states lengths, concurrency and parallelism of a benchmark in a closed loop. It is served in
two parts: a steady state, entered with the first requests already part done, and the burst of all
users at the start, which benchmarks count in their means. How much of it they count, what client
and front end add to a first token, and which kernels the engine picked for the model, is not
stated: `testbed.analysis.pooling` learns it from the rows that we ship.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from emulators.models import available_models, load_model
from emulators.profiles import GpuProfile, load_gpu
from emulators.timing import IterationCost, Precision, Stack
from testbed.analysis.closed_loop import build, serve_closed_loop, serve_trace
from testbed.analysis.measured import Columns, card_for, find, need, read, size
from testbed.analysis.pooling import Pool, Pooled, Rows
from testbed.core.messages import EngineConfig, Request

GPUS = {"h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm", "b200_sxm": "b200-sxm"}
_log = logging.getLogger(__name__)
_ROUNDS = 3
_MAX_BATCHED_TOKENS = 8192
_NEEDED = ["model_path", "system", "backend", "precision", "mode", "isl", "osl", "tp_size",
           "concurrency", "silicon_ttft_ms", "silicon_tpot_ms"]  # fmt: skip


class Setup(NamedTuple):
    """What a row says of how a model was served."""

    model: str
    gpu: str
    backend: str
    precision: Precision | None
    num_gpus: int
    expert_parallel: bool
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    spread: float
    """Lengths are drawn evenly from (1 - spread, 1] times the nominal ones."""

    @property
    def configuration(self) -> str:
        """Model, GPUs, engine and parallelism: what cross-validation leaves out together."""
        return "|".join(
            [self.model, self.gpu, self.backend, str(self.precision), str(self.num_gpus),
             str(self.expert_parallel)]
        )  # fmt: skip


class Prediction(NamedTuple):
    """What the engine did with a row, seconds."""

    steady_ttft_s: float
    burst_ttft_s: float
    tpot_s: float
    kv_demand_frac: float
    """KV blocks that all users together want, over those there are. Near 1 queues begin."""


def setups(columns: Columns) -> list[Setup | None]:
    """Each row's setup; None for what is not modelled.

    Not modelled: separate prefill and decode workers, attention data parallelism, pipelines, GPUs
    and models without a profile or card.
    """
    need(columns, _NEEDED, "llm_e2e_silicon/silicon_sample")
    return [
        _setup({name: values[row] for name, values in columns.items()})
        for row in range(size(columns))
    ]


def _setup(row: dict[str, Any]) -> Setup | None:
    card = card_for(str(row["model_path"]))
    gpu = GPUS.get(row["system"])
    if card is None or gpu is None or row["mode"] != "agg":
        return None
    prompt, output = _number(row["isl"], 0.0), _number(row["osl"], 0.0)
    if prompt < 1 or output < 2:
        return None
    if _number(row.get("attention_dp_size"), 1) > 1 or _number(row.get("pp_size"), 1) > 1:
        return None
    tp = int(_number(row["tp_size"], 1))
    moe_tp = int(_number(row.get("moe_tp_size"), 1))
    moe_ep = int(_number(row.get("moe_ep_size"), 1))
    # Some rows state the product of the two expert degrees as tensor parallelism.
    num_gpus = max(moe_tp, moe_ep) if tp > 8 else max(tp, moe_tp, moe_ep)
    concurrency = _number(row["concurrency"], _number(row.get("batch_size"), 0.0))
    if num_gpus > 8 or concurrency < 1:
        return None
    precision: Precision | None = None
    if card != "gpt-oss-120b":
        stated = row["precision"]
        precision = stated if stated in ("bf16", "fp8", "fp4", "int4") else "bf16"
    fixed = "gap-analysis" in str(row.get("source", "gap-analysis"))
    return Setup(
        card, gpu, str(row["backend"]), precision, num_gpus, moe_ep > 1, int(prompt),
        int(output), int(concurrency), 0.0 if fixed else 0.2,
    )  # fmt: skip


def _number(value: Any, default: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return default
    return default if np.isnan(number) else number


def serve(setup: Setup, stack: Stack) -> Prediction | None:
    """Serve a setup; None if the model does not fit."""
    cost = IterationCost(
        load_model(setup.model),
        load_gpu(setup.gpu),
        tp=setup.num_gpus,
        ep=setup.num_gpus if setup.expert_parallel else 1,
        precision=setup.precision,
        stack=stack,
    )
    users = setup.concurrency
    config = EngineConfig(
        max_num_seqs=max(users, 256), max_batched_tokens=max(_MAX_BATCHED_TOKENS, users + 1024)
    )
    try:
        engine = build(cost, config)
    except ValueError:
        return None
    draw = np.random.default_rng(0)
    count = max(users * _ROUNDS, 12)
    prompts = np.rint(setup.prompt_tokens * draw.uniform(1 - setup.spread, 1, count))
    outputs = np.maximum(2, np.rint(setup.output_tokens * draw.uniform(1 - setup.spread, 1, count)))
    first = min(users, count)
    # The first users are found part done, evenly.
    started = outputs.copy()
    started[:first] = np.maximum(2, outputs[:first] * (draw.permutation(first) + 1) / first)
    requests = [
        Request(row, 0.0, int(prompts[row]), int(started[row])) for row in range(count)
    ]  # fmt: skip
    served = serve_closed_loop(engine, requests, users)
    later = [one for row, one in served.items() if row >= first]
    if not later:
        return None
    short = [Request(row, 0.0, int(prompts[row]), 2) for row in range(first)]
    burst = serve_trace(build(cost, config), short)
    wanted = users * (setup.prompt_tokens + setup.output_tokens) * (1 - setup.spread / 2)
    return Prediction(
        float(np.mean([one.ttft_s for one in later])),
        float(np.mean([one.ttft_s for one in burst.values()])),
        float(np.mean([one.tpot_s for one in later])),
        wanted / (engine.kv_blocks * config.block_size_tokens),
    )


# Pooling what a row does not state.

SATURATED = 0.95
"""Share of the KV blocks that all users want, from which queues for memory rule a row."""
PLAIN = Stack(iteration_s=1e-3, seq_s=1e-5)
"""A stack of the time, the same for every engine; what engines differ in is pooled."""
FIRST_TOKEN_S = 0.02
"""From a request's arrival to the scheduler, and from the sampled token to its stamp. Read off
vLLM's rows of `llm_e2e_silicon` with the shortest kernels (gpt-oss-120b, 4 users, 1024 tokens):
their first tokens come 18 ms (B200) and 24 ms (H200) later than kernels and queue take."""
BURST_FRAC = 0.1
"""Share of requests that come at once when users begin: such benchmarks send ten per user."""
EFFECTS = COURSES = ["harness", "weights", "family", "configuration"]


class ServedRows(NamedTuple):
    """Rows that the engine has served."""

    setups: list[Setup]
    predictions: Any
    """(row, entry of `Prediction`)."""
    measured: Any
    """(row, TTFT and TPOT), seconds."""

    def take(self, which: Any) -> ServedRows:
        """Some of them, by index."""
        chosen = [self.setups[row] for row in which]
        return ServedRows(chosen, self.predictions[which], self.measured[which])

    @property
    def saturated(self) -> Any:
        """Where users want more KV blocks than there are."""
        return self.predictions[:, 3] > SATURATED

    def below_saturation(self) -> ServedRows:
        """The rows that queues for memory do not rule."""
        return self.take(np.flatnonzero(~self.saturated))

    def computed(self, name: str) -> Any:
        """``ttft`` or ``tpot`` by engine and queue, seconds."""
        steady_s, burst_s, tpot_s, _ = self.predictions.T
        if name == "tpot":
            return tpot_s
        return FIRST_TOKEN_S + (1.0 - BURST_FRAC) * steady_s + BURST_FRAC * burst_s

    def logs(self, name: str) -> Any:
        """Log of measured over computed."""
        return np.log(self.measured[:, 0 if name == "ttft" else 1] / self.computed(name))

    def rows(self) -> Rows:
        """As a `Pool` wants them."""
        setups = self.setups
        models = [load_model(one.model) for one in setups]
        course = np.log2(
            [[one.concurrency, one.prompt_tokens, one.output_tokens] for one in setups]
        )
        shape = np.log2([[one.hidden, one.active_params, one.experts] for one in models])
        own = [
            [np.log2(one.num_gpus), one.expert_parallel, one.spread > 0,
             *(one.precision == name for name in ("bf16", "fp8", "fp4", "int4")),
             *(one.backend == name for name in ("vllm", "sglang", "trtllm")),
             *(one.gpu == name for name in GPUS.values())]
            for one in setups
        ]  # fmt: skip
        features = np.column_stack(
            [course, np.log2(self.predictions[:, :3]), self.predictions[:, 3], shape,
             np.array(own, float)]
        )  # fmt: skip

        def label(name: Callable[[Setup], str]) -> Any:
            return np.array([name(one) for one in setups], dtype=object)

        labels = {
            "gpu": label(lambda one: one.gpu),
            "harness": label(lambda one: f"{one.gpu}|{one.backend}|{one.spread > 0}"),
            "weights": label(lambda one: f"{one.model}|{one.precision}"),
            "family": label(lambda one: f"{one.model}|{one.gpu}|{one.backend}"),
            "configuration": label(lambda one: one.configuration),
            "point": label(str),
        }
        return Rows(features, labels, course)


def served_rows(data: Path) -> ServedRows | None:
    """The rows of ``data/llm_e2e_silicon`` that are modelled, served; None without any."""
    columns = find(data / "llm_e2e_silicon", "silicon_sample")
    if columns is None:
        return None
    chosen, predictions, measured = [], [], []
    memory: dict[Setup, Prediction | None] = {}  # dumps repeat each other
    times = np.column_stack([columns["silicon_ttft_ms"], columns["silicon_tpot_ms"]]) / 1e3
    for row, setup in enumerate(setups(columns)):
        if setup is None or not (times[row] > 0).all():
            continue
        if setup not in memory:
            memory[setup] = serve(setup, PLAIN)
        served = memory[setup]
        if served is not None:
            chosen.append(setup)
            predictions.append(served)
            measured.append(times[row])
    if not chosen:
        return None
    return ServedRows(chosen, np.array(predictions, float), np.array(measured))


def pools(folder: Path) -> dict[str, Pool]:
    """`Pool` of TTFT and TPOT, of the rows that we ship."""
    served = served_rows(folder)
    assert served is not None, "shipped data are part of the package"
    served = served.below_saturation()
    pooled = msgspec.json.decode((folder / "pooled.json").read_bytes(), type=dict[str, Pooled])
    rows = served.rows()
    return {name: Pool(rows, served.logs(name), pooled[name]) for name in ("ttft", "tpot")}


# Recorded runs of vLLM, request by request.

_CARDS = {
    "rtxpro6000": "rtx-pro-6000",
    "rtx4090": "rtx-4090",
    "h100": "h100-sxm",
    "h200": "h200-sxm",
    "a100": "a100-80gb",
    "b200": "b200-sxm",
}
VLLM_STACK = Stack(iteration_s=1.6e-3, seq_s=0.0)
"""vLLM 0.19 with CUDA graphs: scheduling and sampling that kernels do not hide."""


class Run(NamedTuple):
    """A recorded run and what we make of it; arrays have one entry per request."""

    name: str
    gpu: str
    model: str
    tp: int
    ttft_s: Any
    tpot_s: Any
    predicted_ttft_s: Any
    predicted_tpot_s: Any


def runs(data: Path) -> list[Run]:
    """Serve every recorded run under ``data/vllm_runs``.

    Runs on GPUs or of models that we have no profile or card of are left out, with a line in the
    log.

    Raises:
        SpecError: a run lacks a column.
    """
    found = [_run(path) for path in sorted((data / "vllm_runs").glob("*_requests.csv*"))]
    return [run for run in found if run is not None]


def _run(path: Path) -> Run | None:
    name = path.name.split("_requests")[0]
    meta_path = path.parent / f"{name}_meta.json"
    meta = json.loads(meta_path.read_text()) if meta_path.is_file() else {}
    arguments = meta.get("engine_kwargs", {})
    label = f"{name} {json.dumps(meta)}".lower().replace(" ", "").replace("-", "")
    gpu = next((gpu for part, gpu in _CARDS.items() if part in name.lower()), None)
    gpu = gpu or next((gpu for part, gpu in _CARDS.items() if part in label), None)
    stated = meta.get("model") or arguments.get("model")
    model = card_for(str(stated)) if stated else _named(name)
    if gpu is None or model is None:
        _log.warning("%s left out: no GPU profile or model card for this run", path.name)
        return None
    tp = _find_number(arguments, "tensor_parallel_size") or _find_number(meta, "tp", "tp_size")
    if tp is None:
        stated_tp = re.search(r"(?:^|_)tp(\d+)", name.lower())
        tp = float(stated_tp[1]) if stated_tp else 1.0
    profile = load_gpu(gpu)
    block_tokens = int(_find_number(meta, "block_size") or 16)
    config = EngineConfig(
        max_num_seqs=int(_find_number(arguments, "max_num_seqs") or 256),
        max_batched_tokens=int(
            _find_number(arguments, "max_num_batched_tokens") or _batched_tokens(profile)
        ),
        block_size_tokens=block_tokens,
        gpu_memory_frac=float(_find_number(meta, "gpu_memory_utilization") or 0.9),
        kv_blocks=_recorded_blocks(meta, block_tokens),
    )
    columns = read(path)
    need(columns, ["input_tokens", "output_tokens", "arrival_s", "first_token_s", "last_token_s"],
         path.name)  # fmt: skip
    cost = IterationCost(load_model(model), profile, tp=int(tp), stack=VLLM_STACK)
    try:
        engine = build(cost, config)
    except ValueError as error:
        _log.warning("%s left out: %s", path.name, error)
        return None
    requests = [
        Request(row, float(columns["arrival_s"][row]), int(columns["input_tokens"][row]),
                int(columns["output_tokens"][row]))
        for row in range(size(columns))
    ]  # fmt: skip
    served = serve_trace(engine, requests)
    done = np.array(sorted(served))
    steps = np.maximum(1, columns["output_tokens"] - 1)
    measured_tpot = (columns["last_token_s"] - columns["first_token_s"]) / steps
    measured_ttft = columns["first_token_s"] - columns["arrival_s"]
    return Run(
        name, gpu, model, int(tp), measured_ttft[done], measured_tpot[done],
        np.array([served[row].ttft_s for row in done]) + FIRST_TOKEN_S,
        np.array([served[row].tpot_s for row in done]),
    )  # fmt: skip


def _named(name: str) -> str | None:
    """The model card in the name of a file, where points are left out and dashes are not."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    cards = [one for one in available_models() if re.sub(r"[^a-z0-9]", "", one) in plain]
    return max(cards, key=len, default=None)


def _batched_tokens(gpu: GpuProfile) -> int:
    """vLLM's default for its server: more on GPUs of at least 70 GiB."""
    return 8192 if gpu.memory_bytes >= 70 * 2**30 else 2048


def _recorded_blocks(meta: dict[str, Any], block_tokens: int) -> int:
    """KV blocks as the engine logged them, in blocks or in tokens; 0 where it did not."""
    blocks = _find_number(
        meta, "num_gpu_blocks", "kv_blocks", "gpu_blocks", "num_gpu_blocks_override",
        "kv_cache_blocks", "num_kv_blocks", "num_blocks",
    )  # fmt: skip
    if blocks:
        return int(blocks)
    tokens = _find_number(
        meta, "kv_cache_tokens", "kv_cache_size_tokens", "gpu_kv_cache_tokens", "kv_tokens",
        "kv_cache_size",
    )  # fmt: skip
    return int((tokens or 0) // block_tokens)


def _find_number(tree: Any, *names: str) -> float | None:
    """The first number under one of these keys, anywhere in nested tables."""
    if isinstance(tree, dict):
        for name in names:
            value = tree.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        for value in tree.values():
            found = _find_number(value, *names)
            if found is not None:
                return found
    return None
