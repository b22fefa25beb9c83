"""Serving with real kernels: the engine decides the batch, a worker process runs it.

The scheduler is the emulated engine's, told to wait (`Engine(measured=True)`): each iteration goes
to a worker (`daemons.executors.torch_worker`) that runs kernels of that shape on the real device,
and ends when the worker says so. First-token times and gaps are then real time, queueing included.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from daemons.executors import torch_worker
from emulators.engine import Engine, Event
from emulators.models import ModelCard, load_model
from emulators.profiles import load_gpu
from emulators.server import GivenUp, gaps_of, readings_of, tune_engine
from emulators.timing import IterationCost
from testbed.core.errors import DeviceError, SpecError
from testbed.core.messages import (
    InstanceConfig,
    InstanceReadings,
    Request,
    TuneKind,
)
from testbed.shells.fixed import FixedServing

_DEFAULT_KV_BLOCKS = 2048
_START_TIMEOUT_S = 120.0


class _Worker:
    """A worker process and the engine it works for."""

    def __init__(
        self, engine: Engine, model: ModelCard, device: str, uuid: str, ballast_bytes: int
    ) -> None:
        self.engine = engine
        self.busy = False
        arguments = {
            "shape": shape_of(model),
            "device": device,
            "threads": 1,
            "ballast_bytes": ballast_bytes,
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(torch_worker.__file__)), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": uuid} if uuid else None,
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        """Until its kernels have run once.

        Raises:
            DeviceError: it ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line.strip() != b"ready":
            code = self.process.wait(_START_TIMEOUT_S)
            raise DeviceError(f"the torch worker ended with exit status {code}; see the log above")

    def push(self) -> None:
        """Start the engine's iteration if one waits and none runs."""
        batch = self.engine.batch
        if batch is None or self.busy:
            return
        assert self.process.stdin is not None
        self.busy = True
        self.process.stdin.write(json.dumps(batch._asdict()).encode() + b"\n")


def shape_of(model: ModelCard) -> dict[str, int]:
    """What the worker needs to know of a model."""
    vision = model.vision
    return {
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "ffn": model.ffn,
        "vocab": model.vocab,
        "vision_layers": vision.layers if vision else 0,
        "vision_hidden": vision.hidden if vision else 0,
        "vision_ffn": vision.ffn if vision else 0,
        "vision_patches": vision.patches_per_tile if vision else 0,
    }


class ExecutedServing(FixedServing):
    """Instances whose iterations are real; answers `daemons.seams.Serving`.

    Args:
        device: ``cpu`` or ``cuda``.
        attach: puts a worker's process on the GPU with that index of the node.
        wall_s: the run's clock.
        watch: has a file descriptor end the shell's waiting.
        uuids: of the node's CUDA devices, so that each worker sees its own only.
    """

    def __init__(
        self,
        device: str,
        attach: Callable[[int, int], None],
        wall_s: Callable[[], float],
        watch: Callable[[int], None],
        *,
        uuids: list[str] | None = None,
    ) -> None:
        self.preprocess_slowdown = 1.0
        self._uuids = uuids or []
        self._device = device
        self._attach = attach
        self._wall_s = wall_s
        self._watch = watch
        self._workers: list[_Worker] = []
        self._returned: list[GivenUp] = []

    def configure(self, instances: list[InstanceConfig], t_s: float) -> None:
        """Start a worker per instance and wait until all are warm.

        Raises:
            DeviceError: a model is unknown, or a worker cannot start.
        """
        for instance in instances:
            try:
                model = load_model(instance.model)
            except SpecError as error:
                raise DeviceError(f"instance {instance.name}: {error}") from None
            # The cost counts operations only; the profile's own times are not used.
            cost = IterationCost(model, load_gpu("h100-sxm"), tp=1)
            engine = Engine(
                cost,
                instance.engine,
                kv_blocks=instance.engine.kv_blocks or _DEFAULT_KV_BLOCKS,
                tokens_per_tile=model.tokens_per_tile,
                image_in_prompt=model.image_in_prompt,
                measured=True,
            )
            uuid = self._uuids[instance.gpus[0]] if self._uuids else ""
            worker = _Worker(engine, model, self._device, uuid, instance.engine.ballast_bytes)
            self._workers.append(worker)
            self._attach(instance.gpus[0], worker.process.pid)
        for worker in self._workers:
            worker.wait_ready()
            assert worker.process.stdout is not None
            self._watch(worker.process.stdout.fileno())

    def collect(self, ready: Callable[[int], bool]) -> bool:
        """Take in what workers have finished; True if an iteration ended."""
        ended = False
        for worker in self._workers:
            assert worker.process.stdout is not None
            if worker.busy and ready(worker.process.stdout.fileno()):
                line = worker.process.stdout.readline()
                if not line:
                    raise DeviceError("a torch worker died")
                worker.busy = False
                worker.engine.complete(max(self._wall_s(), worker.engine.now_s))
                worker.push()
                ended = True
        return ended

    def tune(self, kind: TuneKind, instances: list[int], values: list[float], t_s: float) -> None:
        """A quick change to some instances."""
        for instance, value in zip(instances, values, strict=True):
            worker = self._workers[instance]
            self._returned += tune_engine(worker.engine, instance, kind, value, t_s)
            worker.push()

    def submit(self, instance: int, request: Request, t_s: float, ttft_s: float = math.inf) -> None:
        """Give a request to an instance."""
        worker = self._workers[instance]
        worker.engine.preprocess_slowdown = self.preprocess_slowdown
        worker.engine.submit(request, max(t_s, worker.engine.now_s), ttft_s)
        worker.push()

    def advance_to(self, t_s: float) -> None:
        """Let images be prepared that are due."""
        for worker in self._workers:
            if worker.engine.next_event_s <= t_s:
                worker.engine.advance_to(t_s)
                worker.push()

    @property
    def next_event_s(self) -> float:
        """When the next image is prepared; iterations end when they end."""
        return min((worker.engine.next_event_s for worker in self._workers), default=math.inf)

    def drain_events(self) -> list[Event]:
        """What happened since the last call."""
        events: list[Event] = []
        for worker in self._workers:
            events += worker.engine.events
            worker.engine.events.clear()
        return events

    def drain_returned(self) -> list[GivenUp]:
        """Requests given up since the last call."""
        returned, self._returned = self._returned, []
        return returned

    def drain_gaps(self) -> list[tuple[int, int, int]]:
        """Inter-token gaps since the last call: (instance, histogram bin, count)."""
        return gaps_of([worker.engine for worker in self._workers])

    def read(self, t_s: float) -> InstanceReadings:
        """Queue, batch and KV use of each instance."""
        return readings_of([worker.engine for worker in self._workers], t_s)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            for pipe in (worker.process.stdin, worker.process.stdout):
                if pipe is not None:
                    pipe.close()
