"""GPU profiles: what an emulated GPU is, one TOML file each.

Every constant is a table with its ``value``, its ``source`` and, where somebody measured it, the
``error`` of the value. A profile without a source for each constant is refused.

>>> gpu = load_gpu("h100-sxm")
>>> gpu.power_limit_min_w, gpu.power_limit_default_w, gpu.sm_clock_max_mhz
(200.0, 700.0, 1980.0)
>>> load_gpu("h100-pcie-9")
Traceback (most recent call last):
...
testbed.core.errors.SpecError: GPU 'h100-pcie-9' is none of: a100-80gb, h100-sxm
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import msgspec

from testbed.core.errors import SpecError


class GpuProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Constants of one GPU model. Power constants are explained in `emulators.power`."""

    name: str
    full_name: str
    architecture: int
    """NVML_DEVICE_ARCH_*: 7 Ampere, 9 Hopper, 10 Blackwell."""
    memory_bytes: float
    memory_reserved_bytes: float
    peak_flops: float
    """Dense BF16 operations per second at the highest clock."""
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    """One direction, per GPU."""
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
    """Time constant with which the cap controller lowers the clock."""
    cap_raise_s: float
    """Time constant with which it raises the clock again."""
    idle_w: float
    busy_w: float
    tensor_w: float
    hbm_w: float
    voltage_floor_frac: float
    voltage_knee_frac: float
    bandwidth_knee_frac: float
    gemm_efficiency: float
    attention_efficiency: float
    hbm_efficiency: float
    kv_efficiency: float
    allreduce_latency_s: float
    host_iteration_s: float
    """Host and launch time per iteration that kernels do not hide."""
    host_seq_s: float
    """The same per sequence of the batch: scheduling, sampling, detokenising."""
    preprocess_s: float
    """CPU time to decode and resize one image, on one core."""
    thermal_offset_c: float
    thermal_fast_c_per_w: float
    thermal_fast_s: float
    thermal_slow_c_per_w: float
    thermal_slow_s: float
    mem_temp_offset_c: float
    temp_slowdown_c: float
    temp_shutdown_c: float

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
    """The profile called ``name``.

    Raises:
        SpecError: there is none, or its file is wrong.
    """
    return _build(name)[0]


@cache
def load_sources(name: str) -> dict[str, str]:
    """Where each constant of a profile comes from."""
    return _build(name)[1]


def _build(name: str) -> tuple[GpuProfile, dict[str, str]]:
    if name not in available_gpus():
        raise SpecError(f"GPU {name!r} is none of: {', '.join(available_gpus())}")
    tree: dict[str, Any] = msgspec.toml.decode(
        (resources.files(__name__) / f"{name}.toml").read_bytes()
    )
    values: dict[str, Any] = {"name": name}
    sources: dict[str, str] = {}
    for key, entry in tree.items():
        if isinstance(entry, dict):
            if not str(entry.get("source", "")):
                raise SpecError(f"GPU profile {name}: {key} has no source")
            values[key], sources[key] = entry.get("value"), str(entry["source"])
        else:
            values[key] = entry
    try:
        return msgspec.convert(values, GpuProfile), sources
    except msgspec.ValidationError as error:
        raise SpecError(f"GPU profile {name}: {error}") from None
