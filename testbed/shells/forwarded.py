"""Serving by a real OpenAI-compatible server: requests go to its URL, and what comes back is timed.

A request becomes a streamed completion with a prompt of about so many tokens and exactly so many
to generate (``ignore_eos``, which vLLM and SGLang take). The first chunk is the first token, gaps
between chunks are inter-token gaps, the end is the end; an error is a rejection. Queue, batch and
KV use are scraped from the server's ``/metrics`` under vLLM's names, once a second.

Images are not sent: a request's image tokens are added to its text, which loads the language model
as they would and the vision encoder not at all.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from emulators.engine import Event, EventKind, ItlHistogram
from emulators.server import GivenUp
from testbed.core.errors import DeviceError, SpecError
from testbed.core.messages import (
    InstanceConfig,
    InstanceReadings,
    Request,
    TuneKind,
)
from testbed.shells.fixed import FixedServing

_MAX_STREAMS = 256
_TIMEOUT_S = 300.0
_SCRAPE_S = 1.0
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_PREEMPTIONS = "vllm:num_preemptions"


class ForwardedServing(FixedServing):
    """One instance behind a URL; answers `daemons.seams.Serving`.

    Args:
        url: ``http://HOST:PORT``.
        wall_s: the run's clock.
        watch: has a file descriptor end the shell's waiting.

    Raises:
        SpecError: the URL is not one.
    """

    def __init__(self, url: str, wall_s: Callable[[], float], watch: Callable[[int], None]) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise SpecError(f"server {url!r}: expected http://HOST:PORT")
        self.preprocess_slowdown = 1.0  # a real server prepares its images itself
        self._host, self._port = parts.hostname, parts.port or 80
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._gaps = ItlHistogram()
        self._streams = ThreadPoolExecutor(_MAX_STREAMS, thread_name_prefix="stream")
        self._model = ""
        self._scraped: dict[str, float] = {}
        self._active = 0
        self._prompt_tokens = self._output_tokens = 0
        self._ended = threading.Event()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        watch(self._wake_in)

    def configure(self, instances: list[InstanceConfig], t_s: float) -> None:
        """Ask the server what it serves.

        Raises:
            DeviceError: it does not answer, or more than one instance is asked of it.
        """
        if len(instances) != 1:
            raise DeviceError(f"a server is one instance, {len(instances)} were asked for")
        try:
            models = json.loads(self._get("/v1/models"))["data"]
            self._model = str(models[0]["id"])
        except (OSError, ValueError, KeyError, IndexError, http.client.HTTPException) as error:
            where = f"http://{self._host}:{self._port}/v1/models"
            raise DeviceError(f"server {where}: {error!r}") from None
        threading.Thread(target=self._scrape, daemon=True).start()

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            return answer.read()
        finally:
            connection.close()

    def _scrape(self) -> None:
        while not self._ended.wait(_SCRAPE_S):
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                found: dict[str, float] = {}
                for family in text_string_to_metric_families(self._get("/metrics").decode()):
                    for sample in family.samples:
                        name = sample.name.removesuffix("_total")
                        found[name] = found.get(name, 0.0) + sample.value
                self._scraped = found

    def tune(self, kind: TuneKind, instances: list[int], values: list[float], t_s: float) -> None:
        """Refuse: nothing in the protocol sets a server's batch or queue."""
        raise DeviceError(f"a server behind a URL takes no {kind!r}")

    def submit(self, instance: int, request: Request, t_s: float, ttft_s: float = math.inf) -> None:
        """Send a request; what becomes of it is told by `drain_events`."""
        self._active += 1
        self._streams.submit(self._stream, request)

    def _stream(self, request: Request) -> None:
        """One request, from sending to its last chunk."""
        prompt_tokens = request.prompt_tokens + request.image_tokens
        body = {
            "model": self._model,
            # A common short word is one token in every tokenizer in use.
            "prompt": "the " * prompt_tokens,
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
        }
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        last_s = 0.0
        chunks = 0
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            for line in answer:
                if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                    continue
                now_s = self._wall_s()
                if not chunks:
                    self._tell(request.id, "first_token", now_s)
                    self._prompt_tokens += prompt_tokens
                else:
                    with self._lock:
                        self._gaps.add(now_s - last_s)
                chunks += 1
                self._output_tokens += 1
                last_s = now_s
            self._tell(request.id, "finished" if chunks else "rejected", self._wall_s())
        except (OSError, ValueError, http.client.HTTPException):
            self._tell(request.id, "rejected", self._wall_s())
        finally:
            connection.close()
            self._active -= 1

    def _tell(self, request_id: int, kind: EventKind, t_s: float) -> None:
        with self._lock:
            self._events.append(Event(request_id, kind, t_s, 0))
        os.write(self._wake_out, b"x")

    def collect(self, ready: Callable[[int], bool]) -> bool:
        """Whether something happened since last time."""
        if not ready(self._wake_in):
            return False
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_in, 65536)
        return True

    def advance_to(self, t_s: float) -> None:
        """Real time passes by itself."""

    @property
    def next_event_s(self) -> float:
        """What happens next is the server's business."""
        return math.inf

    def drain_events(self) -> list[Event]:
        """What happened since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def drain_returned(self) -> list[GivenUp]:
        """A server gives nothing back."""
        return []

    def drain_gaps(self) -> list[tuple[int, int, int]]:
        """Inter-token gaps since the last call: (instance, histogram bin, count)."""
        with self._lock:
            counts = self._gaps.drain()
        return [(0, place, count) for place, count in sorted(counts.items())]

    def read(self, t_s: float) -> InstanceReadings:
        """As the server says, or as many as we wait for where it has no metrics."""
        scraped = self._scraped
        kv_used = next((scraped[name] for name in _KV if name in scraped), 0.0)
        return InstanceReadings(
            num_running=[int(scraped.get(_RUNNING, self._active))],
            num_waiting=[int(scraped.get(_WAITING, 0))],
            kv_used_frac=[min(1.0, max(0.0, kv_used))],
            prompt_tokens_total=[self._prompt_tokens],
            output_tokens_total=[self._output_tokens],
            preemptions_total=[int(scraped.get(_PREEMPTIONS, 0))],
        )

    def close(self) -> None:
        """Stop waiting for the server; it goes on by itself."""
        self._ended.set()
        self._streams.shutdown(wait=False, cancel_futures=True)
