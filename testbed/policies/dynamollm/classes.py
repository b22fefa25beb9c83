"""Classes of requests by their lengths, and a predictor of the output that can be made wrong.

The cuts are DynamoLLM's: the 33rd and 66th percentile of its traces. A class is named by its input,
then its output: ``ss`` to ``ll``.

>>> class_of(200, 50), class_of(200, 5000), class_of(4000, 120)
('ss', 'sl', 'lm')
>>> larger("ms"), larger("ll")
(('mm', 'ml', 'll', 'ls', 'lm'), ())
"""

from __future__ import annotations

from functools import cache

import numpy as np

SIZES = "sml"
INPUT_CUTS_TOKENS = (256, 1024)
OUTPUT_CUTS_TOKENS = (100, 350)
ALL = "all"
"""The pool and the class of a system without classes."""
CLASSES = tuple(f"{i}{o}" for i in SIZES for o in SIZES)


def size_of(tokens: int, cuts_tokens: tuple[int, int]) -> int:
    """0, 1 or 2 for short, medium or long."""
    return (tokens >= cuts_tokens[0]) + (tokens >= cuts_tokens[1])


def class_of(prompt_tokens: int, output_tokens: int) -> str:
    """The class of a request whose lengths are known."""
    return CLASSES[
        3 * size_of(prompt_tokens, INPUT_CUTS_TOKENS) + size_of(output_tokens, OUTPUT_CUTS_TOKENS)
    ]


def next_larger(name: str) -> str:
    """Where what does not fill a node of this class goes: a longer output, then a longer input.

    >>> [next_larger(name) for name in ("ss", "sl", "ml", "ll")]
    ['sm', 'ml', 'll', 'll']
    """
    i, o = SIZES.index(name[0]), SIZES.index(name[1])
    if o < 2:
        return f"{name[0]}{SIZES[o + 1]}"
    return f"{SIZES[min(2, i + 1)]}l"


def covers(name: str, other: str) -> bool:
    """Whether a class is at least as large as another in both lengths.

    >>> covers("mm", "sm"), covers("mm", "sl")
    (True, False)
    """
    return all(SIZES.index(a) >= SIZES.index(b) for a, b in zip(name, other, strict=True))


@cache
def larger(name: str) -> tuple[str, ...]:
    """Classes that cover this one, in the order in which its requests spill to them.

    First those that the cluster manager moves its load to, then the others.
    """
    chain = [name]
    while chain[-1] != CLASSES[-1]:
        chain.append(next_larger(chain[-1]))
    others = [other for other in CLASSES if covers(other, name) and other not in chain]
    return (*chain[1:], *others)


def mix_of(name: str) -> str:
    """Name of the mix of a class and all that it covers.

    >>> mix_of("ml"), mix_of("ss")
    ('ml+', 'ss')
    """
    return f"{name}+" if name != CLASSES[0] else name


MIXES = tuple(
    (mix_of(name), tuple(other for other in CLASSES if covers(name, other))) for name in CLASSES[1:]
)


class Predictor:
    """Predicts the output's size; wrong for ``error_frac`` of the requests, evenly on the others.

    It stands for a learned predictor of known accuracy: it looks at the true length and errs as
    often as it is told to.

    >>> certain, poor = Predictor(0.0), Predictor(0.4)
    >>> certain.class_of(10, 120), sum(poor.class_of(10, 120) != "sm" for _ in range(1000))
    ('sm', ...)
    """

    def __init__(self, error_frac: float, seed: int = 1) -> None:
        if not 0 <= error_frac <= 1:
            raise ValueError(f"predictor_error = {error_frac} must be in [0, 1]")
        self.error_frac = error_frac
        self._draw = np.random.default_rng([seed, 41])
        self._drawn: list[float] = []

    def class_of(self, prompt_tokens: int, output_tokens: int) -> str:
        """The class that a request is taken for."""
        size = size_of(output_tokens, OUTPUT_CUTS_TOKENS)
        if self.error_frac:
            if not self._drawn:
                self._drawn = self._draw.random(4096).tolist()
            chance = self._drawn.pop()
            if chance < self.error_frac:
                size = (size + 1 + (chance < self.error_frac / 2)) % 3
        return CLASSES[3 * size_of(prompt_tokens, INPUT_CUTS_TOKENS) + size]
