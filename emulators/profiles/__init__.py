"""GPU profiles: what an emulated GPU is, one TOML file each.

Every constant, or group of constants fitted together, is a table with its ``value``, its
``source``, its ``date`` and, where somebody measured it, the ``error`` of the value. A profile
without a source for each constant is refused. Fitted ones are written by
`testbed.analysis.fitting`, with their cross-validated error.

>>> gpu = load_gpu("h100-sxm")
>>> gpu.power_limit_min_w, gpu.power_limit_default_w, gpu.sm_clock_max_mhz
(200.0, 700.0, 1980.0)
>>> load_gpu("h100-pcie-9")
Traceback (most recent call last):
...
testbed.core.errors.SpecError: GPU 'h100-pcie-9' is none of: a100-40gb, a100-80gb, ...
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from emulators.kernels import (
    Chip,
    DecodeAttention,
    Elementwise,
    Gemm,
    Moe,
    PrefillAttention,
    Reduce,
)
from testbed.core.errors import SpecError


class GpuProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Constants of one GPU model. Power constants are explained in `emulators.power`."""

    name: str
    full_name: str
    architecture: int
    """NVML_DEVICE_ARCH_*: 7 Ampere, 8 Ada, 9 Hopper, 10 Blackwell."""
    memory_bytes: float
    memory_reserved_bytes: float
    runtime_bytes: float
    """Activations and runtime that a serving engine keeps beside weights and KV blocks."""
    num_sms: int
    peak_flops: float
    """Dense BF16 operations per second at the highest clock."""
    fp8_speed: float
    """Operations per second at FP8 over those at BF16; 1 where FP8 is unpacked first."""
    fp4_speed: float
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    """One direction, per GPU; PCIe where there is no NVLink."""
    sm_clock_min_mhz: float
    sm_clock_max_mhz: float
    sm_clock_step_mhz: float
    sm_clock_idle_mhz: float
    mem_clock_mhz: float
    power_limit_min_w: float
    power_limit_max_w: float
    power_limit_default_w: float
    power_average_s: float
    """Window of NVML's power reading; 0 where it is not averaged."""
    cap_reaction_s: float
    """Time constant of the cap controller, downwards."""
    cap_raise_s: float
    """The same upwards."""
    idle_w: float
    busy_w: float
    tensor_w: float
    hbm_w: float
    decode_ops: float
    """Operations per decoded token, layer and hidden unit that no formula of the model counts:
    normalising, padding of small batches. Known by the power they draw."""
    sample_ops: float
    """The same per decoded token and entry of the vocabulary: sampling."""
    voltage_floor_frac: float
    voltage_knee_frac: float
    bandwidth_knee_frac: float
    gemm_bf16: Gemm
    gemm_fp8: Gemm
    decode_attention: DecodeAttention
    prefill_attention: PrefillAttention
    encoder_peak_frac: float
    moe_bf16: Moe
    moe_fp8: Moe
    reduce: Reduce
    elementwise: Elementwise
    launch_s: float
    """Host time to launch one kernel outside a CUDA graph."""
    host_iteration_s: float
    """Host and launch time per iteration that kernels do not hide."""
    host_seq_s: float
    """The same per sequence of the batch: scheduling, sampling, detokenising."""
    preprocess_s: float
    """CPU time to decode and resize one image, on one core."""
    thermal_exponent: float
    """Temperature goes as power to this: below 1 where fans answer heat."""
    thermal_offset_c: float
    thermal_fast_c_per_w: float
    thermal_fast_s: float
    thermal_slow_c_per_w: float
    thermal_slow_s: float
    mem_temp_offset_c: float
    temp_slowdown_c: float
    temp_shutdown_c: float

    @property
    def chip(self) -> Chip:
        """Data-sheet numbers for `emulators.kernels`."""
        return Chip(self.peak_flops, self.hbm_bytes_per_s, self.num_sms)

    @property
    def gemm_efficiency(self) -> float:
        """Highest share of peak that matrix products reach."""
        return self.gemm_bf16.peak_frac

    @property
    def power_limit_range_w(self) -> tuple[float, float]:
        """What the limit can be set to."""
        return self.power_limit_min_w, self.power_limit_max_w


def available_gpus() -> list[str]:
    """Names of the profiles we ship."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".toml")
    )


@cache
def load_gpu(name: str) -> GpuProfile:
    """The profile called ``name``, or in the file ``name`` where that ends in ``.toml``.

    Raises:
        SpecError: there is none, or its file is wrong.
    """
    return _build(name)[0]


@cache
def load_sources(name: str) -> dict[str, str]:
    """Where each constant of a profile comes from."""
    return _build(name)[1]


def _build(name: str) -> tuple[GpuProfile, dict[str, str]]:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise SpecError(f"GPU profile {name}: no such file")
        text = path.read_bytes()
        name = path.stem
    elif name in available_gpus():
        text = (resources.files(__name__) / f"{name}.toml").read_bytes()
    else:
        raise SpecError(f"GPU {name!r} is none of: {', '.join(available_gpus())}")
    try:
        tree: dict[str, Any] = msgspec.toml.decode(text)
    except msgspec.DecodeError as error:
        raise SpecError(f"GPU profile {name}: {error}") from None
    values: dict[str, Any] = {"name": name}
    sources: dict[str, str] = {}
    for key, entry in tree.items():
        if isinstance(entry, dict):
            unknown = entry.keys() - {"value", "source", "date", "error"}
            if unknown:
                raise SpecError(
                    f"GPU profile {name}: {key} has unknown {', '.join(sorted(unknown))}"
                )
            if not str(entry.get("source", "")):
                raise SpecError(f"GPU profile {name}: {key} has no source")
            values[key], sources[key] = entry.get("value"), str(entry["source"])
        else:
            values[key] = entry
    try:
        return msgspec.convert(values, GpuProfile), sources
    except msgspec.ValidationError as error:
        raise SpecError(f"GPU profile {name}: {error}") from None
