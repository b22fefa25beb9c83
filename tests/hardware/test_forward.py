"""Forwarding to an OpenAI-compatible server: a small one of our own stands in."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from daemons.devices import cgroup
from testbed.core.errors import DeviceError, SpecError
from testbed.core.messages import EngineConfig, InstanceConfig, NodeConfig, Request
from testbed.recorder.reader import Recording
from testbed.shells.executed import ExecutedServing
from testbed.shells.forwarded import ForwardedServing
from testbed.shells.node import readable
from tests.conftest import cli

SPEC = """
name = "forwarded"
mode = "hardware"
device = "cpu"
duration_s = 3
[cluster]
gpus_per_node = 1
[[pool]]
model = "toy-8m"
gpus_per_node = 1
[workload]
source = "poisson"
rate_rps = 4.0
prompt_tokens = 20
output_tokens = 6
"""


class Answer(BaseHTTPRequestHandler):
    """Streams a token every 20 ms after 50 ms; refuses prompts of more than 1,000 words."""

    seen: ClassVar[list[dict]] = []

    def do_GET(self):
        if self.path == "/v1/models":
            data = json.dumps({"data": [{"id": "tiny"}]})
        else:
            data = (
                "# TYPE vllm:num_requests_running gauge\n"
                'vllm:num_requests_running{model_name="tiny"} 3.0\n'
                "# TYPE vllm:num_requests_waiting gauge\n"
                'vllm:num_requests_waiting{model_name="tiny"} 2.0\n'
                "# TYPE vllm:kv_cache_usage_perc gauge\n"
                'vllm:kv_cache_usage_perc{model_name="tiny"} 0.25\n'
            )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        if len(body["prompt"].split()) > 1000:
            self.send_error(400)
            return
        self.send_response(200)
        self.end_headers()
        time.sleep(0.05)
        for _ in range(body["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"text": "the"}]}\n\n')
            self.wfile.flush()
            time.sleep(0.02)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Answer.seen = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()


def instance() -> InstanceConfig:
    return InstanceConfig("n/a0", "a", "toy-8m", 1, [0], EngineConfig())


def test_requests_are_sent_and_timed(server):
    begun = time.monotonic()
    watched = []
    serving = ForwardedServing(server, lambda: time.monotonic() - begun, watched.append)
    serving.configure([instance()], 0.0)
    serving.submit(0, Request(1, 0.0, 12, 5), 0.0)
    serving.submit(0, Request(2, 0.0, 5000, 5), 0.0)
    events = []
    deadline = time.monotonic() + 10
    while len(events) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
        if serving.collect(readable):
            events += serving.drain_events()
    kinds = {(event.request_id, event.kind) for event in events}
    assert kinds == {(1, "first_token"), (1, "finished"), (2, "rejected")}
    [first] = [event.t_s for event in events if event.kind == "first_token"]
    [last] = [event.t_s for event in events if event.kind == "finished"]
    assert first >= 0.05
    assert last - first >= 4 * 0.02
    assert sum(count for _, _, count in serving.drain_gaps()) == 4
    sent = next(body for body in Answer.seen if body["max_tokens"] == 5)
    assert sent["ignore_eos"]
    assert sent["model"] == "tiny"
    deadline = time.monotonic() + 5
    while serving.read(0.0).num_running != [3] and time.monotonic() < deadline:
        time.sleep(0.05)
    reading = serving.read(0.0)
    assert reading.num_waiting == [2]
    assert reading.kv_used_frac == [0.25]
    assert reading.output_tokens_total == [5]
    serving.close()


def test_no_server_is_a_clear_error():
    with pytest.raises(SpecError, match="expected http"):
        ForwardedServing("ftp://x", lambda: 0.0, lambda fd: None)
    serving = ForwardedServing("http://127.0.0.1:9", lambda: 0.0, lambda fd: None)
    with pytest.raises(DeviceError, match="v1/models"):
        serving.configure([instance()], 0.0)


@pytest.mark.parametrize("kind", ["torch", "server"])
def test_instances_of_real_engines_stay_as_they_are(kind):
    """A node that is asked for others says so, and does not fall over later."""
    if kind == "torch":
        serving = ExecutedServing("cpu", lambda gpu, pid: None, lambda: 0.0, lambda fd: None)
    else:
        serving = ForwardedServing("http://127.0.0.1:9", lambda: 0.0, lambda fd: None)
    config = NodeConfig(
        name="n", instances=[instance()], safe_power_limit_w=[400.0], sample_period_s=0.1,
        lease_s=5.0, ramp_down_w_per_s=100.0, ramp_up_w_per_s=50.0, delay_s=0.0, elastic=True,
    )  # fmt: skip
    with pytest.raises(DeviceError, match=r"cluster\.elastic needs emulated GPUs"):
        serving.configure_slots(config, 0.0)
    with pytest.raises(DeviceError, match="no layout 3"):
        serving.arrange(3, [instance()], "cold", 0.0)
    assert serving.slots().serial == []
    serving.close()


@pytest.mark.live
@pytest.mark.skipif(
    not (cgroup.probe().cpu and cgroup.probe().writable), reason="no writable cpu cgroups"
)
def test_a_run_against_a_server(server, tmp_path):
    spec = tmp_path / "spec.toml"
    spec.write_text(SPEC)
    done = cli("run", spec, "--forward", server, "--out", tmp_path, "--json", "--no-report")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["requests"]["completed"] == summary["requests"]["arrived"] > 3
    assert summary["ttft_s"]["p50"] >= 0.05
    assert 0.015 < summary["itl_s"]["p50"] < 0.1
    [folder] = [path.parent for path in tmp_path.glob("*/manifest.json")]
    assert 3 in Recording.open(folder).table("instances")["num_running"].to_pylist()
