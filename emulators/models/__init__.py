"""Model cards: the shape of a model, one small TOML file each.

>>> card = load_model("llama-3.1-8b")
>>> round(card.params / 1e9, 2), card.kv_bytes_per_token
(8.03, 131072)
>>> load_model("llava-onevision-7b").tokens_per_image
7290
"""

from __future__ import annotations

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


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decoder-only transformer with gated feed-forward layers and grouped-query attention."""

    name: str
    source: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int = 1
    experts_active: int = 1
    gated: bool = True
    tied_embeddings: bool = False
    bytes_per_weight: float = 2.0
    bytes_per_kv: float = 2.0
    vision: VisionCard | None = None

    @property
    def attention_params(self) -> int:
        """Query, key, value and output projections of all layers."""
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * q_dim + 2 * kv_dim)

    @property
    def ffn_params(self) -> int:
        """Feed-forward weights of one expert over all layers."""
        return self.layers * self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def params(self) -> int:
        """All weights of the language model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.attention_params + self.ffn_params * self.experts

    @property
    def token_params(self) -> int:
        """Weights that each token is multiplied with in the layers (not the output head)."""
        return self.attention_params + self.ffn_params * self.experts_active

    @property
    def head_params(self) -> int:
        """Weights of the output head, needed once per sequence and iteration."""
        return self.vocab * self.hidden

    @property
    def vision_params(self) -> int:
        """Weights of the vision encoder."""
        vision = self.vision
        if vision is None:
            return 0
        return vision.layers * (4 * vision.hidden**2 + 2 * vision.hidden * vision.ffn)

    @property
    def weight_bytes(self) -> float:
        """Memory for all weights."""
        return (self.params + self.vision_params) * self.bytes_per_weight

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache of one token over all layers."""
        return int(2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_kv)

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
