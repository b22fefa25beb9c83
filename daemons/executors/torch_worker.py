"""Runs engine iterations as torch kernels of the same shapes, one after another.

A process of its own, so that a limit can act on it and on nothing else. It is told a model's shape
and a device on its command line, and a batch per line on stdin, as JSON: decoding sequences, the
context that they read together, prompt chunks with what came before each, encoder tiles. It answers
each with a line: the seconds that the kernels took. Weights and caches hold random numbers: what
matters is the work. Ends when stdin does.

The linear layers of all tokens run as one matrix product per weight, as in continuous batching;
attention runs per prompt chunk, and once for all decoding sequences at their mean context.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any


class Stages:
    """A decoder's layers on one device, with random weights.

    Args:
        shape: layers, hidden, heads, kv_heads, head_dim, ffn, vocab; and of the vision encoder
            vision_layers, vision_hidden, vision_ffn, vision_patches (0 for none).
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; one makes a CPU quota act evenly.
    """

    def __init__(self, shape: dict[str, int], device: str, threads: int = 1) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.shape = shape
        self.device = device
        self.kind = torch.bfloat16 if device == "cuda" else torch.float32
        hidden = shape["hidden"]
        q_dim = shape["heads"] * shape["head_dim"]
        kv_dim = shape["kv_heads"] * shape["head_dim"]
        self.qkv = self._random(hidden, q_dim + 2 * kv_dim)
        self.out = self._random(q_dim, hidden)
        self.up = self._random(hidden, 2 * shape["ffn"])
        self.down = self._random(shape["ffn"], hidden)
        self.head = self._random(hidden, shape["vocab"])
        self.buffer = self._random(1 << 20)
        if shape["vision_layers"]:
            self.vision_in = self._random(shape["vision_hidden"], 4 * shape["vision_hidden"])
            self.vision_up = self._random(shape["vision_hidden"], shape["vision_ffn"])
            self.vision_down = self._random(shape["vision_ffn"], shape["vision_hidden"])

    def _random(self, *size: int) -> Any:
        return self.torch.randn(*size, device=self.device, dtype=self.kind) * 0.02

    def _cache(self, *size: int) -> Any:
        """Keys or values of that size: a view of one buffer, as a KV cache is."""
        count = math.prod(size)
        if self.buffer.numel() < count:
            self.buffer = self._random(2 * count)
        return self.buffer[:count].view(*size)

    def run(self, batch: dict[str, Any]) -> float:
        """Do one iteration; returns its seconds, kernels finished."""
        torch = self.torch
        with torch.inference_mode():
            self._finish()
            begun = time.perf_counter()
            for _ in range(batch["encode_tiles"]):
                self._encode()
            tokens = batch["num_seqs"] + sum(take for take, _ in batch["chunks"])
            if tokens:
                x = self._random(tokens, self.shape["hidden"])
                for _ in range(self.shape["layers"]):
                    x = self._layer(x, batch)
                heads = batch["num_seqs"] + len(batch["chunks"])
                (x[:heads] @ self.head).argmax(dim=-1)
            self._finish()
            return time.perf_counter() - begun

    def _finish(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _layer(self, x: Any, batch: dict[str, Any]) -> Any:
        shape, functional = self.shape, self.torch.nn.functional
        heads, dim = shape["heads"], shape["head_dim"]
        query = (x @ self.qkv)[:, : heads * dim]
        parts = []
        start = batch["num_seqs"]
        if start:
            context = max(1, batch["context_tokens"] // start)
            cache = self._cache(start, heads, context, dim)
            q = query[:start].reshape(start, heads, 1, dim)
            parts.append(
                functional.scaled_dot_product_attention(q, cache, cache).reshape(start, -1)
            )
        for take, before in batch["chunks"]:
            q = query[start : start + take].reshape(1, take, heads, dim).transpose(1, 2)
            cache = self._cache(1, heads, before + take, dim)
            mixed = functional.scaled_dot_product_attention(q, cache, cache, is_causal=before == 0)
            parts.append(mixed.transpose(1, 2).reshape(take, -1))
            start += take
        x = x + self.torch.cat(parts) @ self.out
        up = x @ self.up
        gate, value = up.chunk(2, dim=-1)
        return x + (functional.silu(gate) * value) @ self.down

    def _encode(self) -> None:
        shape, functional = self.shape, self.torch.nn.functional
        x = self._random(shape["vision_patches"], shape["vision_hidden"])
        for _ in range(shape["vision_layers"]):
            q, k, v, _ = (x @ self.vision_in).chunk(4, dim=-1)
            x = x + functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            x = x + functional.gelu(x @ self.vision_up) @ self.vision_down


def hold_ballast(device: str, ballast_bytes: int) -> Any:
    """Take that much of the device's memory and keep it: what is returned must be held.

    Written once, so that it is really there: an untouched page of host memory takes no room.

    Raises:
        SystemExit: there is not so much.
    """
    import torch

    try:
        return torch.ones(ballast_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        free = f", {torch.cuda.mem_get_info()[0] >> 20} MiB are free" if device == "cuda" else ""
        raise SystemExit(
            f"engine.ballast_bytes = {ballast_bytes} does not fit on {device}{free}: {error}"
        ) from None


def main() -> None:
    """Answer batches until stdin ends."""
    arguments = json.loads(sys.argv[1])
    ballast = hold_ballast(arguments["device"], arguments.get("ballast_bytes", 0))
    stages = Stages(arguments["shape"], arguments["device"], arguments["threads"])
    stages.run({"num_seqs": 1, "context_tokens": 8, "chunks": [[8, 0]], "encode_tiles": 0})
    print("ready", flush=True)
    for line in sys.stdin:
        print(stages.run(json.loads(line)), flush=True)
    del ballast


if __name__ == "__main__":
    main()
