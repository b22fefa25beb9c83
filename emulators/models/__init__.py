"""Model cards: the shape of a model, one small TOML file each.

Adding a model is adding its file: the layers, widths and heads that its published configuration
states, and where they were read. Everything that timing and memory need follows from those.

>>> card = load_model("llama-3.1-8b")
>>> round(card.params / 1e9, 2), card.kv_bytes_per_token
(8.03, 131072)
>>> load_model("llava-onevision-7b").tokens_per_image
7290
>>> round(load_model("qwen3-30b-a3b").active_params / 1e9, 1)
3.3
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

from testbed.core.errors import SpecError


class VisionCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vision transformer and how its output reaches the language model."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    patches_per_tile: int
    """Tokens inside the encoder, per tile."""
    tokens_per_tile: int
    """Tokens that the connector hands on, per tile."""
    tiles_per_image: int
    """For an image of 896 x 896 pixels."""
    connector: Literal["prompt", "cross_attention"] = "prompt"
    cross_layers: int = 0
    """Layers of the language model that attend to the image, if by cross-attention."""
    encode_scale: float = 1.0
    """Measured encode time over what its kernels take (framework, padding, resolution)."""

    @property
    def params(self) -> int:
        """Weights of the encoder's layers."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


class LatentAttention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head latent attention (DeepSeek-V2, 2024): one compressed key-value per token."""

    kv_rank: int
    q_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder-only transformer: attention, feed-forward or experts, in ``layers`` layers.

    Layers may differ: some attend within a window only (``windowed_layers``), some have a linear
    recurrence in place of attention (``linear_layers``), some no experts (``dense_layers``).
    Hybrids that give each of these a layer of its own count ``layers`` as the sum.
    """

    name: str
    source: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the feed-forward layer, or of one expert."""
    vocab: int
    experts: int = 1
    experts_active: int = 1
    shared_ffn: int = 0
    """Width of the expert that every token passes, where there is one."""
    dense_layers: int = 0
    """Layers with a plain feed-forward of ``dense_ffn`` among layers with experts."""
    dense_ffn: int = 0
    attention_layers: int = 0
    """Layers with attention over the context; 0: all that are not linear."""
    ffn_layers: int = 0
    """Layers with a feed-forward part; 0: all."""
    windowed_layers: int = 0
    """Of the attention layers, those that see the last ``window_tokens`` only."""
    window_tokens: int = 0
    linear_layers: int = 0
    """Layers with a linear recurrence, whose state does not grow."""
    linear_params: int = 0
    """Weights of one of them, beside its feed-forward part."""
    linear_state_bytes: int = 0
    """State of one sequence in one of them, read and written at each token."""
    latent: LatentAttention | None = None
    gated: bool = True
    tied_embeddings: bool = False
    bytes_per_weight: float = 2.0
    """Of the layers' matrices; embeddings, head and vision stay at 2."""
    bytes_per_kv: float = 2.0
    quality_frac: float = 0.0
    """Share of MMLU questions (5 shots) answered, as published for these weights; 0: not declared.
    One number for what a smaller model costs, comparable within a family."""
    quality_source: str = ""
    vision: VisionCard | None = None

    @property
    def num_attention_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.attention_layers or self.layers - self.linear_layers

    @property
    def attention_params_per_layer(self) -> int:
        """Query, key, value and output projections of one attention layer."""
        latent = self.latent
        if latent is not None:
            q_dim = self.heads * (latent.nope_dim + latent.rope_dim)
            down = self.hidden * (latent.q_rank + latent.kv_rank + latent.rope_dim)
            up = latent.q_rank * q_dim
            up += latent.kv_rank * self.heads * (latent.nope_dim + latent.v_dim)
            return down + up + self.heads * latent.v_dim * self.hidden
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * q_dim + 2 * kv_dim)

    @property
    def attention_params(self) -> int:
        """Projections of all attention layers, and linear recurrences."""
        attention = self.num_attention_layers * self.attention_params_per_layer
        return attention + self.linear_layers * self.linear_params

    @property
    def num_ffn_layers(self) -> int:
        """Layers with a feed-forward part of width ``ffn`` (or experts of it)."""
        return (self.ffn_layers or self.layers) - self.dense_layers

    @property
    def ffn_params_per_layer(self) -> int:
        """One feed-forward part, or one expert."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def ffn_params(self) -> int:
        """Feed-forward weights over all layers, one expert of each."""
        return self.num_ffn_layers * self.ffn_params_per_layer

    @property
    def plain_ffn_params(self) -> int:
        """Weights of shared experts and of plain layers among layers with experts."""
        factor = self.hidden * (3 if self.gated else 2)
        return factor * (self.num_ffn_layers * self.shared_ffn + self.dense_layers * self.dense_ffn)

    @property
    def params(self) -> int:
        """All weights of the language model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        experts = self.ffn_params * self.experts
        return embeddings + self.attention_params + experts + self.plain_ffn_params

    @property
    def token_params(self) -> int:
        """Weights that each token is multiplied with in the layers (not the output head)."""
        return self.attention_params + self.ffn_params * self.experts_active + self.plain_ffn_params

    @property
    def active_params(self) -> int:
        """Weights that take part in one token, embedding and head included."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return self.token_params + embeddings

    @property
    def head_params(self) -> int:
        """Weights of the output head, needed once per sequence and iteration."""
        return self.vocab * self.hidden

    @property
    def vision_params(self) -> int:
        """Weights of the vision encoder."""
        return self.vision.params if self.vision else 0

    @property
    def weight_bytes(self) -> float:
        """Memory for all weights, at ``bytes_per_weight`` in the layers and 2 bytes elsewhere."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        layers = self.params - embeddings
        return layers * self.bytes_per_weight + 2.0 * (embeddings + self.vision_params)

    @property
    def kv_bytes_per_token_layer(self) -> float:
        """Keys and values of one token in one layer."""
        if self.latent is not None:
            return (self.latent.kv_rank + self.latent.rope_dim) * self.bytes_per_kv
        return 2 * self.kv_heads * self.head_dim * self.bytes_per_kv

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache of one token over all layers that keep one.

        Windowed layers count in full: vLLM's block tables of equal size do the same unless its
        hybrid allocator is on.
        """
        return int(self.num_attention_layers * self.kv_bytes_per_token_layer)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens per encoder tile; 0 for a text model."""
        return self.vision.tokens_per_tile if self.vision else 0

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of an 896 x 896 image; 0 for a text model."""
        return self.vision.tokens_per_tile * self.vision.tiles_per_image if self.vision else 0

    @property
    def image_in_prompt(self) -> bool:
        """Whether image tokens join the prompt."""
        return self.vision is None or self.vision.connector == "prompt"


BYTES_PER_WEIGHT: dict[str, float] = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625, "int4": 0.53}
"""By precision, scales included: FP8 per tensor or block, FP4 in groups of 16, INT4 of 128."""

KEPT_QUALITY: dict[str, float] = {"bf16": 1.0, "fp8": 0.997, "fp4": 0.97, "int4": 0.985}
"""Quality left when weights published at BF16 are quantised. FP8: mean of Llama-3.1-8B and -70B,
73.44 of 73.79 and 79.70 of 79.84 on the Open LLM Leaderboard (model cards of Neural Magic's FP8
versions). INT4 and FP4: assumed; arXiv 2411.02355 has INT4 weights 1 to 2 % below BF16."""


def precision_of(card: ModelCard, precision: str) -> str:
    """What ``native`` means for a card, and any other precision itself.

    >>> precision_of(load_model("llama-3.1-8b"), "native")
    'bf16'
    """
    if precision != "native":
        return precision
    alike = [name for name, size in BYTES_PER_WEIGHT.items() if size == card.bytes_per_weight]
    return alike[0] if alike else "native"


def weight_bytes(card: ModelCard, precision: str) -> float:
    """Memory for all weights at a precision of the layers."""
    if precision != "native":
        card = msgspec.structs.replace(card, bytes_per_weight=BYTES_PER_WEIGHT[precision])
    return card.weight_bytes


def quality_frac(card: ModelCard, precision: str) -> float:
    """Declared quality at a precision; NaN where none is declared.

    Weights published below BF16 (native FP8, say) have their quality at that precision, and no
    more at a wider one.

    >>> card = load_model("llama-2-70b")
    >>> quality_frac(card, "bf16"), round(quality_frac(card, "fp8"), 3)
    (0.689, 0.687)
    """
    if not card.quality_frac:
        return math.nan
    if precision == "native":
        return card.quality_frac
    if BYTES_PER_WEIGHT[precision] >= card.bytes_per_weight:
        return card.quality_frac
    return card.quality_frac * KEPT_QUALITY[precision]


def available_models() -> list[str]:
    """Names of the cards we ship."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".toml")
    )


@cache
def load_model(name: str) -> ModelCard:
    """The card called ``name``.

    Raises:
        SpecError: there is none, or its file is wrong.
    """
    if name not in available_models():
        raise SpecError(f"model {name!r} is none of: {', '.join(available_models())}")
    data = (resources.files(__name__) / f"{name}.toml").read_bytes()
    try:
        tree = msgspec.toml.decode(data)
        return msgspec.convert({"name": name, **tree}, ModelCard)
    except msgspec.MsgspecError as error:
        raise SpecError(f"model card {name}: {error}") from None
