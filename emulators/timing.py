"""Time and work of one engine iteration, in closed form.

An iteration runs the linear layers over its tokens (decoding sequences plus prefill chunk), reads
the KV cache of decoding sequences, computes attention of the chunk, encodes images, and pays the
host. With per-GPU work after splitting by tensor parallelism and the SM clock ``x`` over its
highest value:

    linear   soft maximum of  weights / (HBM bandwidth * e_hbm * m(x))
                        and  2 * params * tokens / (peak * e_gemm * x)
    context  KV bytes of the contexts / (HBM bandwidth * e_kv * m(x))     linear in context tokens
    pairs    4 * q_dim * layers per (query, key) pair / (peak * e_att * x)  linear in pairs
    encode   vision transformer operations / (peak * e_gemm * x)
    reduce   two all-reduces per layer
    host     host_iteration + host_seq * sequences                          does not scale with x

``m(x) = min(1, x / bandwidth_knee)``: memory time does not see the SM clock until it is very low.
Only ``context`` and ``pairs`` grow within a run of alike iterations, both linearly: that is what
lets the engine sum a run at once.

A scalar evaluation is plain float arithmetic on precomputed coefficients.
"""

from __future__ import annotations

from emulators.models import ModelCard
from emulators.profiles import GpuProfile

_ACTIVATION_BYTES = 2.0


class IterationCost:
    """Cost of iterations of a model on ``tp`` GPUs; answers `emulators.engine.Cost`.

    Args:
        model: its card.
        gpu: profile of the GPUs.
        tp: tensor-parallel degree.

    >>> from emulators.models import load_model
    >>> from emulators.profiles import load_gpu
    >>> cost = IterationCost(load_model("llama-3.1-8b"), load_gpu("h100-sxm"))
    >>> round(1e3 * (cost.base_s(16, 0, 0, 0, 1.0) + 16 * 800 * cost.per_context_token_s(1.0)), 1)
    7.8
    """

    def __init__(self, model: ModelCard, gpu: GpuProfile, *, tp: int = 1) -> None:
        self.model, self.gpu, self.tp = model, gpu, tp
        flops_per_s = gpu.peak_flops
        bytes_per_s = gpu.hbm_bytes_per_s
        self._knee = gpu.bandwidth_knee_frac
        self._host_s = gpu.host_iteration_s
        self._host_seq_s = gpu.host_seq_s

        experts_share = model.experts_active / model.experts
        self._expert_bytes = model.ffn_params * model.experts * model.bytes_per_weight / tp
        self._shared_bytes = (
            (model.attention_params + model.head_params) * model.bytes_per_weight / tp
        )
        self._idle_share = 1.0 - experts_share
        self._dense = model.experts == 1
        self._flops_token = 2.0 * model.token_params / tp
        self._flops_head = 2.0 * model.head_params / tp
        # Activations in and out of each linear layer, once per token.
        self._bytes_token = 12.0 * model.layers * model.hidden * _ACTIVATION_BYTES / tp
        self._weight_s = 1.0 / (bytes_per_s * gpu.hbm_efficiency)
        self._flop_s = 1.0 / (flops_per_s * gpu.gemm_efficiency)

        q_dim = model.heads * model.head_dim
        self.flops_per_pair = 4.0 * q_dim * model.layers / tp
        self.bytes_per_pair = 0.0  # keys are re-read from cache, not from HBM, within a tile
        self._pair_s = self.flops_per_pair / (flops_per_s * gpu.attention_efficiency)
        self.flops_per_context_token = 4.0 * q_dim * model.layers / tp
        self.bytes_per_context_token = model.kv_bytes_per_token / tp
        self._context_s = self.bytes_per_context_token / (bytes_per_s * gpu.kv_efficiency)

        self._reduce_s = self._reduce_token_s = 0.0
        if tp > 1:
            share = 2.0 * (tp - 1) / tp
            self._reduce_s = 2.0 * model.layers * gpu.allreduce_latency_s
            self._reduce_token_s = (
                2.0 * model.layers * share * model.hidden * _ACTIVATION_BYTES
                / gpu.nvlink_bytes_per_s
            )  # fmt: skip

        vision = model.vision
        self._flops_tile = self._bytes_tile = 0.0
        if vision is not None:
            linear = 2.0 * model.vision_params * vision.patches_per_tile
            attention = 4.0 * vision.layers * vision.hidden * vision.patches_per_tile**2
            self._flops_tile = (linear + attention) / tp
            self._bytes_tile = (
                24.0 * vision.layers * vision.hidden * vision.patches_per_tile * _ACTIVATION_BYTES
            ) / tp

    def base_s(
        self,
        num_seqs: int,
        prefill_tokens: int,
        num_prefill_seqs: int,
        encode_tiles: int,
        clock_frac: float,
    ) -> float:
        """Seconds of an iteration apart from context and pairs."""
        tokens = num_seqs + prefill_tokens
        memory_s = self._weights(tokens) * self._weight_s
        if clock_frac < self._knee:
            memory_s *= self._knee / clock_frac
        heads = num_seqs + num_prefill_seqs
        compute_s = (self._flops_token * tokens + self._flops_head * heads) * self._flop_s
        compute_s /= clock_frac
        # Fourth-power mean: near the ridge, loads and operations overlap only in part.
        linear_s: float = (memory_s**4 + compute_s**4) ** 0.25
        reduce_s = self._reduce_s + self._reduce_token_s * tokens
        host_s = self._host_s + self._host_seq_s * heads
        total_s = linear_s + reduce_s + host_s
        if encode_tiles:
            total_s += self.encode_s(encode_tiles, clock_frac)
        return total_s

    def _weights(self, tokens: int) -> float:
        """Bytes of weights that an iteration over ``tokens`` reads, per GPU.

        With experts, the expected share of them that at least one token is routed to, for routing
        that is uniform and independent.
        """
        if self._dense:
            return self._shared_bytes + self._expert_bytes
        return self._shared_bytes + self._expert_bytes * (1.0 - self._idle_share**tokens)

    def encode_s(self, encode_tiles: int, clock_frac: float) -> float:
        """Seconds for the vision encoder to do so many tiles."""
        return encode_tiles * self._flops_tile * self._flop_s / clock_frac

    def per_context_token_s(self, clock_frac: float) -> float:
        """Seconds per token of KV cache that decoding sequences read."""
        if clock_frac < self._knee:
            return self._context_s * self._knee / clock_frac
        return self._context_s

    def per_pair_s(self, clock_frac: float) -> float:
        """Seconds per (query, key) pair of prefill attention."""
        return self._pair_s / clock_frac

    def base_flops(
        self, num_seqs: int, prefill_tokens: int, num_prefill_seqs: int, encode_tiles: int
    ) -> float:
        """Operations of an iteration apart from context and pairs, per GPU."""
        return (
            self._flops_token * (num_seqs + prefill_tokens)
            + self._flops_head * (num_seqs + num_prefill_seqs)
            + self._flops_tile * encode_tiles
        )

    def base_bytes(
        self, num_seqs: int, prefill_tokens: int, num_prefill_seqs: int, encode_tiles: int
    ) -> float:
        """Bytes of memory traffic of an iteration apart from context and pairs, per GPU."""
        tokens = num_seqs + prefill_tokens
        weights = self._weights(tokens) if tokens else 0.0
        return weights + self._bytes_token * tokens + self._bytes_tile * encode_tiles

    def preprocess_s(self) -> float:
        """CPU seconds to prepare one image on one core; 0 for a text model."""
        return self.gpu.preprocess_s if self.model.vision else 0.0

    def kv_blocks(self, gpu_memory_frac: float = 0.9, block_size_tokens: int = 16) -> int:
        """KV blocks that fit beside the weights, over all ``tp`` GPUs; below 1 if they do not.

        As vLLM counts: the given share of each GPU's memory, less weights and about 2 GB of
        activations and runtime (assumed).
        """
        gpu_bytes = self.gpu.memory_bytes * gpu_memory_frac - 2e9
        left = gpu_bytes * self.tp - self.model.weight_bytes
        return int(left // (self.model.kv_bytes_per_token * block_size_tokens))
