"""The small run over ZeroMQ: the run file, with the policies of an arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from testbed.core.spec import PolicySpec, RunSpec, parse_spec
from testbed.experiment import load_beside

cluster = load_beside(__file__, "cluster")
TEXT = Path(__file__).with_name("run.toml").read_text(encoding="utf-8")


def live_profiles(spec: RunSpec) -> list[dict[str, Any]]:
    """Profiles of what the endpoint of the small run may be."""
    slo = spec.slo_class[0]
    configs = tuple(
        cluster.Config(model, "bf16", tp, batch)
        for model in ("llama-2-13b", "llama-2-7b")
        for tp in (2, 1)
        for batch in (256, 64)
    )
    rows: list[dict[str, Any]] = cluster.profile_rows("chat", configs, slo.ttft_s, slo.tpot_s)
    return rows


def live_spec(arm: str, overrides: list[str]) -> RunSpec:
    """The run of an arm: ``baseline`` or ``tapas``."""
    spec = parse_spec(TEXT, overrides)
    if arm == "baseline":
        return spec
    [_, cap] = spec.policy
    tapas = PolicySpec(
        use="tapas",
        params={"profiles": live_profiles(spec), "period_s": 1.0, "observe_s": 1.0},
    )
    patient = PolicySpec(
        use=cap.use, params={**cap.params, "grace_s": 5.0}, precedence=cap.precedence
    )
    router = PolicySpec(use="tapas:TapasRouter", params={"table_s": 1.0})
    return msgspec.structs.replace(spec, policy=[tapas, patient], router=router)
