"""Measures the device at hand, writes its profile, and compares it with its emulated twin.

`calibrate` times the kernels of a small decoder and a small vision encoder with torch: prefill over
tokens, decoding over batch and context, encoding over tiles, each at several speeds. On a CPU a
speed is a CPU quota; on a GPU a locked clock, where the driver allows it. Points are visited in a
random order again and again, so that drifts of the machine do not look like effects, and each time
is a mean over several periods of the quota.

The profile is the closed form that the engine sums (`emulators.engine.Cost`), one line per phase:

    prefill   (start + a * tokens**c + b * pairs) * speed**-p
    decode    (start + a * sequences**c + b * context tokens) * speed**-p
    encode    (start + a * tiles**c) * speed**-p

Errors are those of lines fitted on one half of the points, on the other half; the lines that are
written are fitted on all.

`validate` times points that calibration did not have, and serves a short trace twice through the
same engine: once each iteration is run on the device and takes as long as it takes, once it takes
what the profile says.

Torch is needed for both (extra ``torch``) and imported when they are called.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from scipy.optimize import least_squares

from emulators.engine import Engine
from testbed.analysis.closed_loop import Served, serve_trace
from testbed.core.errors import DeviceError, SpecError
from testbed.core.messages import EngineConfig, Request

Device = Literal["cpu", "cuda"]
Phase = Literal["prefill", "decode", "encode"]

QUOTAS = (1.0, 0.75, 0.5, 0.3)
"""CPU quotas, or SM clocks over the highest, that are measured."""
_PERIOD_US = 10_000
_LEAST_S = 0.12
"""Time that one visit of a point takes at least: twelve periods of a quota."""
_VISITS = 5
_MOST_SEQS, _MOST_CONTEXT = 24, 768
_LEAST_SHARE = 0.9
"""Of the CPU time due to us, below which a visit counts as disturbed by others."""


class Shape(NamedTuple):
    """The model that is timed: small, so that a CPU runs an iteration in milliseconds."""

    layers: int = 4
    hidden: int = 512
    heads: int = 8
    ffn: int = 1376
    vocab: int = 4096
    encoder_layers: int = 3
    encoder_hidden: int = 256
    patches: int = 196


class Measured(NamedTuple):
    """What `measure` found."""

    times: dict[float, dict[Point, float]]
    """Seconds of each point at each speed."""
    disturbed_frac: float
    """Share of visits in which other processes had part of the core. Where it is high, so are
    errors: they are then the machine's, not the model's."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times of one phase: ``(start_s + first_s * a**bend + second_s * b) * speed**-exponent``."""

    start_s: float
    first_s: float
    bend: float
    """1 where cost goes with the count; below it where small batches are no cheaper in all."""
    second_s: float
    exponent: float

    def time_s(self, first: Any, second: Any, speed: Any) -> Any:
        """Seconds; arguments broadcast."""
        work = self.start_s + self.first_s * first**self.bend + self.second_s * second
        return work * speed**-self.exponent


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `calibrate` writes: three lines, and their errors on points that were left out."""

    device: str
    host: str
    date: str
    prefill: Line
    decode: Line
    encode: Line
    speeds: list[float]
    disturbed_frac: float
    """See `Measured`."""
    errors: list[dict[str, str | float | int]]
    """Rows of {phase, speed, points, ape_mean_frac, ape_max_frac, bias_frac}."""

    def line(self, phase: str) -> Line:
        """The line of a phase."""
        line: Line = getattr(self, phase)
        return line


class Point(NamedTuple):
    """One thing to time. ``first`` and ``second`` are what the phase's line takes."""

    phase: Phase
    number: int
    """Tokens, sequences or tiles."""
    context: int
    """Tokens before the chunk, or of context per sequence."""

    @property
    def first(self) -> float:
        """Tokens, sequences or tiles."""
        return float(self.number)

    @property
    def second(self) -> float:
        """Attended pairs, or context tokens of all sequences."""
        if self.phase == "prefill":
            return self.number * self.context + self.number * (self.number + 1) / 2
        return float(self.number * self.context) if self.phase == "decode" else 0.0


def points() -> list[Point]:
    """What is timed at each speed."""
    prefill = [
        Point("prefill", tokens, before)
        for tokens in (16, 32, 64, 96, 128, 192, 256, 384)
        for before in ((0, 256) if tokens in (64, 192) else (0,))
    ]
    decode = [
        Point("decode", seqs, context)
        for seqs in (1, 2, 4, 8, 16, 24)
        for context in (64, 256, 512)
    ]
    encode = [Point("encode", tiles, 0) for tiles in (1, 2, 3, 4, 6, 8)]
    return prefill + decode + encode


def fresh_points() -> list[Point]:
    """Others, between those: what `validate` times."""
    prefill = [Point("prefill", tokens, 0) for tokens in (24, 48, 80, 112, 160, 224, 320)]
    decode = [Point("decode", seqs, context) for seqs in (3, 6, 12, 20) for context in (128, 384)]
    return [*prefill, *decode, Point("encode", 5, 0), Point("encode", 7, 0)]


# Running kernels.


class Kernels:
    """The kernels of `Shape`, in torch.

    Args:
        device: where they run.
        shape: of the model.

    Raises:
        DeviceError: torch or the device is not there.
    """

    def __init__(self, device: Device, shape: Shape | None = None) -> None:
        try:
            import torch
        except ImportError:
            raise DeviceError(
                "torch is not installed: pip install 'serving-testbed[torch]'"
            ) from None
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("torch sees no CUDA device")
        self._torch, self.device = torch, device
        self.shape = shape = shape or Shape()
        if device == "cpu":
            torch.set_num_threads(1)
        torch.manual_seed(0)
        self._type = torch.float32 if device == "cpu" else torch.bfloat16
        hidden, ffn = shape.hidden, shape.ffn
        self._layers = [
            {
                "qkv": self._random(hidden, 3 * hidden),
                "out": self._random(hidden, hidden),
                "up": self._random(hidden, 2 * ffn),
                "down": self._random(ffn, hidden),
            }
            for _ in range(shape.layers)
        ]
        self._head = self._random(hidden, shape.vocab)
        width = shape.encoder_hidden
        self._encoder = [
            {
                "qkv": self._random(width, 3 * width),
                "out": self._random(width, width),
                "up": self._random(width, 4 * width),
                "down": self._random(4 * width, width),
            }
            for _ in range(shape.encoder_layers)
        ]
        # Keys and values of the longest and widest point; others are parts of it.
        size = (_MOST_SEQS, shape.heads, _MOST_CONTEXT, hidden // shape.heads)
        self._caches = [(self._random(*size), self._random(*size)) for _ in range(shape.layers)]

    def _random(self, *size: int) -> Any:
        values = self._torch.randn(*size, dtype=self._type) * 0.02
        return values.to(self.device)

    def run(self, point: Point) -> None:
        """Run a point once and wait until it is done."""
        with self._torch.inference_mode():
            if point.phase == "encode":
                self._encode(point.number)
            elif point.phase == "prefill":
                self._decoder(1, point.number, point.context)
            else:
                self._decoder(point.number, 1, point.context)
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    def _decoder(self, seqs: int, tokens: int, before: int) -> None:
        torch, shape = self._torch, self.shape
        width = shape.hidden // shape.heads
        seqs, before = min(seqs, _MOST_SEQS), min(before, _MOST_CONTEXT - tokens)
        end = before + tokens
        x = torch.ones(seqs, tokens, shape.hidden, dtype=self._type, device=self.device)
        for index, layer in enumerate(self._layers):
            normed = torch.nn.functional.layer_norm(x, (shape.hidden,))
            q, k, v = (normed @ layer["qkv"]).chunk(3, dim=-1)
            q, k, v = (
                part.view(seqs, tokens, shape.heads, width).transpose(1, 2) for part in (q, k, v)
            )
            keys, values = self._caches[index]
            keys[:seqs, :, before:end] = k
            values[:seqs, :, before:end] = v
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q, keys[:seqs, :, :end], values[:seqs, :, :end],
                is_causal=tokens > 1 and before == 0,
            )  # fmt: skip
            x = x + mixed.transpose(1, 2).reshape(seqs, tokens, shape.hidden) @ layer["out"]
            gate, up = (x @ layer["up"]).chunk(2, dim=-1)
            x = x + (torch.nn.functional.silu(gate) * up) @ layer["down"]
        (x[:, -1] @ self._head).argmax(dim=-1)

    def _encode(self, tiles: int) -> None:
        torch, shape = self._torch, self.shape
        width = shape.encoder_hidden
        x = torch.ones(tiles, shape.patches, width, dtype=self._type, device=self.device)
        for layer in self._encoder:
            q, k, v = (
                part.view(tiles, shape.patches, 4, width // 4).transpose(1, 2)
                for part in (x @ layer["qkv"]).chunk(3, dim=-1)
            )
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + mixed.transpose(1, 2).reshape(tiles, shape.patches, width) @ layer["out"]
            x = x + torch.nn.functional.gelu(x @ layer["up"]) @ layer["down"]


# Speeds.


@contextmanager
def at_speed(device: Device, speed: float) -> Iterator[None]:
    """Hold the device at a share of its speed while inside.

    Raises:
        DeviceError: nothing on this machine can.
    """
    if speed >= 1.0:
        yield
    elif device == "cuda":
        with _locked_clock(speed):
            yield
    else:
        group = _cpu_group()
        with _cgroup_quota(group, speed) if group else _duty_cycle(speed):
            yield


@contextmanager
def _locked_clock(speed: float) -> Iterator[None]:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    highest = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
    try:
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, 0, round(highest * speed))
    except pynvml.NVMLError as error:
        raise DeviceError(f"clocks cannot be locked here: {error}") from None
    try:
        yield
    finally:
        pynvml.nvmlDeviceResetGpuLockedClocks(handle)


class _Group(NamedTuple):
    """Where this process's CPU controller is, and in which version."""

    folder: Path
    version: int


def _cpu_group() -> _Group | None:
    """A CPU cgroup in which we may make a child; None without one."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for mount in mounts:
            version = 1 if mount[2] == "cgroup" and "cpu" in mount[3].split(",") else 0
            if version and "cpu" in controllers.split(","):
                folder = Path(mount[1] + path)
            elif not controllers and mount[2] == "cgroup2":
                folder, version = Path(mount[1] + path), 2
                offered = folder / "cgroup.subtree_control"
                if not offered.is_file() or "cpu" not in offered.read_text().split():
                    continue
            else:
                continue
            if os.access(folder, os.W_OK):
                return _Group(folder, version)
    return None


@contextmanager
def _cgroup_quota(group: _Group, speed: float) -> Iterator[None]:
    child = group.folder / f"testbed-calibrate-{os.getpid()}"
    quota_us = round(_PERIOD_US * speed)
    try:
        child.mkdir(exist_ok=True)
        if group.version == 2:
            (child / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        else:
            (child / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (child / "cpu.cfs_quota_us").write_text(str(quota_us))
        (child / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise DeviceError(f"no CPU quota in {child}: {error.strerror}") from None
    try:
        yield
    finally:
        (group.folder / "cgroup.procs").write_text(str(os.getpid()))
        child.rmdir()


@contextmanager
def _duty_cycle(speed: float) -> Iterator[None]:
    """Without cgroups: a helper process that stops and continues us, period by period."""
    parent = os.getpid()
    helper = os.fork()
    if helper == 0:
        stop = False

        def end(number: int, frame: Any) -> None:
            nonlocal stop
            stop = True

        signal.signal(signal.SIGTERM, end)
        period_s = _PERIOD_US / 1e6
        while not stop and os.getppid() == parent:
            os.kill(parent, signal.SIGSTOP)
            time.sleep(period_s * (1 - speed))
            os.kill(parent, signal.SIGCONT)
            time.sleep(period_s * speed)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(helper, signal.SIGTERM)
        os.waitpid(helper, 0)


# Measuring and fitting.


def measure(
    kernels: Kernels,
    speeds: tuple[float, ...],
    *,
    todo: Sequence[Point] = (),
    visits: int = _VISITS,
    report: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Time each point at each speed: the median over visits of means.

    Visits go round the speeds, and round the points of each in a new random order.
    """
    todo = todo or points()
    seen: dict[float, dict[Point, list[tuple[float, bool]]]] = {
        speed: {point: [] for point in todo} for speed in speeds
    }
    order = random.Random(0)
    for point in todo:
        kernels.run(point)  # first runs allocate
    for visit in range(visits):
        for speed in order.sample(speeds, len(speeds)):
            report(f"visit {visit + 1} of {visits} at speed {speed:g}")
            with at_speed(kernels.device, speed):
                for point in order.sample(todo, len(todo)):
                    seen[speed][point].append(_mean_s(kernels, point, speed))
    times = {
        speed: {point: _undisturbed(visited) for point, visited in table.items()}
        for speed, table in seen.items()
    }
    every = [visit[1] for table in seen.values() for visited in table.values() for visit in visited]
    return Measured(times, float(np.mean(every)))


def _mean_s(kernels: Kernels, point: Point, speed: float) -> tuple[float, bool]:
    """Mean time of runs, and whether somebody else had the core meanwhile.

    If so, it is the CPU time that we had, stretched to what is due to us at this speed.
    """
    count, start, start_cpu = 0, time.perf_counter(), time.process_time()
    while True:
        kernels.run(point)
        count += 1
        spent = time.perf_counter() - start
        if spent >= _LEAST_S:
            used_s = time.process_time() - start_cpu
            disturbed = kernels.device == "cpu" and used_s < _LEAST_SHARE * speed * spent
            return (used_s / speed if disturbed else spent) / count, disturbed


def _undisturbed(visits: list[tuple[float, bool]]) -> float:
    """The median of visits that nobody disturbed; of all, if all were."""
    quiet = [seconds for seconds, disturbed in visits if not disturbed]
    return float(np.median(quiet or [seconds for seconds, _ in visits]))


def fit_lines(
    times: dict[float, dict[Point, float]], chosen: Callable[[Point], bool]
) -> dict[str, Line]:
    """The line of each phase from the chosen points, by least squares of logs."""
    lines = {}
    for phase in ("prefill", "decode", "encode"):
        rows = [
            (point.first, point.second, speed, seconds)
            for speed, table in times.items()
            for point, seconds in table.items()
            if point.phase == phase and chosen(point)
        ]
        first, second, speed, seconds = np.array(rows).T

        def residuals(
            logs: Any, phase: str = phase, first: Any = first, second: Any = second,
            speed: Any = speed, seconds: Any = seconds,
        ) -> Any:  # fmt: skip
            return np.log(_line(phase, logs).time_s(first, second, speed) / seconds)

        start = [seconds.min() / 2, np.median(seconds / first) / 2, 1e-8, 1.0]
        if phase == "decode":
            start.append(1.0)
        best = least_squares(residuals, np.log(start), loss="soft_l1", f_scale=0.05)
        lines[phase] = _line(phase, best.x)
    return lines


def _line(phase: str, logs: Any) -> Line:
    """Only decoding bends: the others are wide enough that cost goes with the count."""
    values = [float(value) for value in np.exp(logs)]
    bend = values[4] if phase == "decode" else 1.0
    return Line(values[0], values[1], bend, values[2], values[3])


def calibrate(
    device: Device,
    *,
    speeds: tuple[float, ...] = QUOTAS,
    visits: int = _VISITS,
    report: Callable[[str], None] = lambda text: None,
) -> DeviceProfile:
    """Measure this machine and describe it; some minutes.

    Args:
        device: what to measure.
        speeds: shares of full speed to measure at; 1.0 must be among them. On a GPU whose clocks
            cannot be locked, only 1.0 is.
        visits: how often each point is timed at each speed.
        report: called with one line of progress.

    Raises:
        DeviceError: torch, the device, or a way to slow it down is missing.
    """
    kernels = Kernels(device)
    if device == "cuda":
        speeds = _lockable(speeds)
    times, disturbed_frac = measure(kernels, speeds, visits=visits, report=report)
    # Every other point of a phase, so that both halves span its range.
    numbered = {point: index for index, point in enumerate(points())}
    lines = fit_lines(times, lambda point: numbered[point] % 2 == 0)
    errors: list[dict[str, str | float | int]] = []
    for phase, line in lines.items():
        for speed, table in times.items():
            off = np.array(
                [
                    float(line.time_s(point.first, point.second, speed)) / seconds - 1.0
                    for point, seconds in table.items()
                    if point.phase == phase and numbered[point] % 2 == 1
                ]
            )
            errors.append(
                {
                    "phase": phase,
                    "speed": speed,
                    "points": len(off),
                    "ape_mean_frac": float(np.abs(off).mean()),
                    "ape_max_frac": float(np.abs(off).max()),
                    "bias_frac": float(off.mean()),
                }
            )
    return DeviceProfile(
        device=device,
        host=f"{platform.machine()} {platform.system()}, torch {kernels._torch.__version__}",
        date=datetime.date.today().isoformat(),
        speeds=list(speeds),
        disturbed_frac=disturbed_frac,
        errors=errors,
        **fit_lines(times, lambda point: True),
    )


def _lockable(speeds: tuple[float, ...]) -> tuple[float, ...]:
    try:
        with at_speed("cuda", 0.9):
            return speeds
    except (DeviceError, ImportError):
        return (1.0,)


def write_profile(profile: DeviceProfile, path: Path) -> None:
    """Write a profile as TOML: each constant with source, date and error."""
    head = f"device = {json.dumps(profile.device)}\nhost = {json.dumps(profile.host)}\n"
    head += f'date = "{profile.date}"\nspeeds = {profile.speeds}\n'
    head += f"disturbed_frac = {profile.disturbed_frac:.4g}\n"
    tables = []
    for phase in ("prefill", "decode", "encode"):
        mine = [row for row in profile.errors if row["phase"] == phase]
        error = ", ".join(
            f"{float(row['ape_mean_frac']):.1%} at speed {float(row['speed']):g}" for row in mine
        )
        value = ", ".join(
            f"{name} = {number:.6g}"
            for name, number in msgspec.structs.asdict(profile.line(phase)).items()
        )
        tables.append(
            f'[{phase}]\nvalue = {{ {value} }}\nsource = "testbed calibrate on this machine"\n'
            f'date = "{profile.date}"\nerror = "mean on points not fitted: {error}"\n'
        )
    for row in profile.errors:
        cells = "\n".join(f"{name} = {json.dumps(value)}" for name, value in row.items())
        tables.append(f"[[errors]]\n{cells}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *tables]), encoding="utf-8")


def load_profile(path: Path) -> DeviceProfile:
    """Read what `write_profile` wrote.

    Raises:
        SpecError: there is no such file, or it is not such a profile.
    """
    try:
        tree = msgspec.toml.decode(path.read_bytes())
        for phase in ("prefill", "decode", "encode"):
            tree[phase] = tree[phase]["value"]
        return msgspec.convert(tree, DeviceProfile)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise SpecError(f"{path}: not a device profile: {error}") from None


# The emulated twin, and the comparison.


class TwinCost:
    """Times of iterations as a profile has them; answers `emulators.engine.Cost`.

    An iteration with decodes and a chunk is both lines, one after the other, as the device runs it.
    """

    flops_per_context_token = bytes_per_context_token = 0.0
    flops_per_pair = bytes_per_pair = 0.0

    def __init__(self, profile: DeviceProfile) -> None:
        self._profile = profile
        self.decode_tables: dict[float, dict[int, tuple[float, float, float]]] = {}

    def base_s(
        self,
        num_seqs: int,
        prefill_tokens: int,
        num_prefill_seqs: int,
        encode_tiles: int,
        clock_frac: float,
    ) -> float:
        """Time of an iteration apart from context and pairs."""
        profile, total = self._profile, 0.0
        if num_seqs:
            total += float(profile.decode.time_s(num_seqs, 0.0, clock_frac))
        if prefill_tokens:
            chunks = max(1, num_prefill_seqs)
            each = profile.prefill.time_s(prefill_tokens / chunks, 0.0, clock_frac)
            total += chunks * float(each)
        return total + self.encode_s(encode_tiles, clock_frac)

    def encode_s(self, encode_tiles: int, clock_frac: float) -> float:
        """The encoder's part of ``base_s``."""
        if not encode_tiles:
            return 0.0
        return float(self._profile.encode.time_s(encode_tiles, 0.0, clock_frac))

    def per_context_token_s(self, clock_frac: float) -> float:
        """Time per token of context that decodes read."""
        line = self._profile.decode
        return float(line.second_s * clock_frac**-line.exponent)

    def per_context_token_mixed_s(self, clock_frac: float) -> float:
        """The same: stages run one after another on this device."""
        return self.per_context_token_s(clock_frac)

    def per_pair_s(self, clock_frac: float) -> float:
        """Time per pair of prefill attention."""
        line = self._profile.prefill
        return float(line.second_s * clock_frac**-line.exponent)

    def base_flops(self, *shape: int) -> float:
        """Not known of a measured device."""
        return 0.0

    def base_bytes(self, *shape: int) -> float:
        """Not known of a measured device."""
        return 0.0


class DeviceCost(TwinCost):
    """Runs each iteration on the device when the engine asks for its time, and answers with that.

    The engine must step one iteration at a time (``collapse=False``) and be given as ``engine``.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.engine: Engine | None = None

    def base_s(
        self,
        num_seqs: int,
        prefill_tokens: int,
        num_prefill_seqs: int,
        encode_tiles: int,
        clock_frac: float,
    ) -> float:
        """Measured time of this iteration, context and pairs included."""
        assert self.engine is not None
        start = time.perf_counter()
        if encode_tiles:
            self._kernels.run(Point("encode", encode_tiles, 0))
        if num_seqs:
            held = self.engine.kv_used_blocks(self.engine.now_s) * 16
            context = max(16, held // max(1, self.engine.num_running))
            self._kernels.run(Point("decode", num_seqs, context))
        if prefill_tokens:
            chunks = max(1, num_prefill_seqs)
            for _ in range(chunks):
                self._kernels.run(Point("prefill", max(1, prefill_tokens // chunks), 0))
        return time.perf_counter() - start

    def encode_s(self, encode_tiles: int, clock_frac: float) -> float:
        """Counted in ``base_s``."""
        return 0.0

    def per_context_token_s(self, clock_frac: float) -> float:
        """Counted in ``base_s``."""
        return 0.0

    def per_context_token_mixed_s(self, clock_frac: float) -> float:
        """Counted in ``base_s``."""
        return 0.0

    def per_pair_s(self, clock_frac: float) -> float:
        """Counted in ``base_s``."""
        return 0.0


def trace(requests: int, rate_rps: float, seed: int = 1) -> list[Request]:
    """A short trace of Poisson arrivals for the small model."""
    draw = np.random.default_rng(seed)
    arrivals = np.cumsum(draw.exponential(1.0 / rate_rps, requests))
    return [
        Request(
            index, float(arrival), int(draw.integers(32, 320)), int(draw.integers(8, 48)),
        )
        for index, arrival in enumerate(arrivals)
    ]  # fmt: skip


def validate(
    profile: DeviceProfile,
    *,
    requests: int = 40,
    load: float = 0.5,
    report: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Time fresh points, and serve a trace on the device and on its twin, at each speed.

    Args:
        profile: of this machine.
        requests: length of the trace.
        load: share of the device's capacity that arrivals ask for.
        report: called with one line of progress.

    Returns:
        Rows of {speed, quantity, measured, emulated, ape_frac}, times in seconds. For `prefill_s`,
        `decode_s` and `encode_s` times are sums over the fresh points and ``ape_frac`` is the mean
        over them; the others are medians and means over the trace's requests.

    Raises:
        DeviceError: torch or the device is missing.
    """
    device: Device = "cuda" if profile.device == "cuda" else "cpu"
    kernels = Kernels(device)
    speeds = tuple(profile.speeds)
    measured = measure(kernels, speeds, todo=fresh_points(), visits=4, report=report)
    report(f"{measured.disturbed_frac:.0%} of the visits were disturbed by other processes")
    rows: list[dict[str, Any]] = []
    for speed, table in measured.times.items():
        for phase in ("prefill", "decode", "encode"):
            mine = [(point, seconds) for point, seconds in table.items() if point.phase == phase]
            seconds = np.array([one[1] for one in mine])
            predicted = np.array(
                [float(profile.line(phase).time_s(one.first, one.second, speed)) for one, _ in mine]
            )
            rows.append(
                {
                    "speed": speed,
                    "quantity": f"{phase}_s",
                    "measured": float(seconds.sum()),
                    "emulated": float(predicted.sum()),
                    "ape_frac": float(np.abs(predicted / seconds - 1.0).mean()),
                }
            )
    for speed in speeds:
        report(f"serving {requests} requests at speed {speed:g}")
        rate = load * _capacity_rps(profile, speed)
        jobs = trace(requests, rate)
        with at_speed(device, speed):
            real = _serve(DeviceCost(kernels), jobs, 1.0)
        twin = _serve(TwinCost(profile), jobs, speed)
        for quantity in ("ttft_s", "tpot_s", "e2e_s"):
            ours, theirs = (
                [getattr(one, quantity) for one in served.values()] for served in (twin, real)
            )
            for name, statistic in (("median", np.median), ("mean", np.mean)):
                took, emulated = float(statistic(theirs)), float(statistic(ours))
                rows.append(
                    {
                        "speed": speed,
                        "quantity": f"{name}_{quantity}",
                        "measured": took,
                        "emulated": emulated,
                        "ape_frac": abs(emulated / took - 1.0),
                    }
                )
    return rows


def _capacity_rps(profile: DeviceProfile, speed: float) -> float:
    """Requests per second of `trace` that the device could just serve, eight at a time."""
    prefill = float(profile.prefill.time_s(176, 176 * 177 / 2, speed))
    decode = float(profile.decode.time_s(8, 8 * 200, speed)) * 28 / 8
    return 1.0 / (prefill + decode)


def _serve(cost: TwinCost, jobs: list[Request], speed: float) -> dict[int, Served]:
    config = EngineConfig(max_num_seqs=16, max_batched_tokens=512, collapse=False)
    engine = Engine(cost, config, kv_blocks=4096, clock_frac=speed)
    if isinstance(cost, DeviceCost):
        cost.engine = engine
    return serve_trace(engine, jobs)
