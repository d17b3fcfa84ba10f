"""The text and the positions of each training step, as functions of the step's number."""

import functools
import hashlib

import numpy as np
import torch
from corpus import SEPARATOR
from tasks import overlay
from torch import Tensor

# Part of each generator's seed, so that no two generators draw the same numbers.
ORDER, EPOCH, ROW, POSITIONS = range(4)


class Windows:
    """Windows [context + 1] of shuffled and joined documents; a window depends on its number alone.

    Attributes:
        text: All documents.
        facts: Fraction of the windows with facts (tasks.py).
        seed: Seed of all generators.
    """

    def __init__(self, documents: list[bytes], facts: float, seed: int):
        order = np.random.default_rng((seed, ORDER)).permutation(len(documents))
        self.text = np.frombuffer(b"".join(documents[i] + SEPARATOR for i in order), np.uint8)
        self.facts, self.seed = facts, seed

    def digest(self) -> str:
        """The SHA-256 of the text, documents in their order."""
        return hashlib.sha256(self.text.tobytes()).hexdigest()

    def _size(self, context: int) -> int:
        """The number of windows in one pass over the text. A pass starts at a random place in the first window."""
        size = (len(self.text) - 1) // context - 1
        if size < 1:
            raise ValueError(f"expected at least {2 * context + 1} bytes of text, got {len(self.text)}")
        return size

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _starts(self, epoch: int, context: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, EPOCH, epoch, context))
        return rng.integers(context) + context * rng.permutation(self._size(context))

    def row(self, number: int, context: int) -> np.ndarray:
        epoch, at = divmod(number, self._size(context))
        start = self._starts(epoch, context)[at]
        window = self.text[start : start + context + 1]
        rng = np.random.default_rng((self.seed, ROW, number))
        if rng.random() < self.facts:
            window = window.copy()
            overlay(window, rng)
        return window

    def batch(self, step: int, rows: int, context: int) -> Tensor:
        """[rows, context + 1] int64."""
        windows = [self.row(step * rows + i, context) for i in range(rows)]
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def positions(step: int, context: int, most: int, seed: int) -> Tensor:
    """The positions [1, context] of a step's tokens. Half of the steps skip some positions; all are below `most`.

    So the model learns all distances up to `most` in short windows, which cost less (PoSE, arXiv 2309.10400).
    """
    places = torch.arange(context)
    rng = np.random.default_rng((seed, POSITIONS, step))
    if rng.random() < 0.5:
        places[rng.integers(1, context) :] += int(rng.integers(most - context + 1))
    return places[None]
