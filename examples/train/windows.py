"""What a training step sees, as a function of its number alone."""

import functools
import hashlib

import numpy as np
import torch
from corpus import SEPARATOR
from tasks import overlay
from torch import Tensor

# Tags of the generators' seeds, so that no two of them draw the same.
ORDER, EPOCH, ROW, POSITIONS = range(4)


class Windows:
    """Windows of shuffled, joined documents, each a function of its number: [context + 1] bytes.

    Attributes:
        text: All documents.
        facts: Share of the windows with key-value lines that come back (tasks.py).
        seed: Of everything that is drawn.
    """

    def __init__(self, documents: list[bytes], facts: float, seed: int):
        order = np.random.default_rng((seed, ORDER)).permutation(len(documents))
        self.text = np.frombuffer(b"".join(documents[i] + SEPARATOR for i in order), np.uint8)
        self.facts, self.seed = facts, seed

    def digest(self) -> str:
        """Of the text, in its order."""
        return hashlib.sha256(self.text).hexdigest()

    def _size(self, context: int) -> int:
        """Windows of a pass over the text, which begins somewhere in the first."""
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
    """Positions [1, context] of a step's tokens, of which half of the steps skip some, up to below `most`.

    So the model sees all distances that RoPE is to know, in windows that are cheap (PoSE, arXiv 2309.10400).
    """
    places = torch.arange(context)
    rng = np.random.default_rng((seed, POSITIONS, step))
    if rng.random() < 0.5:
        places[rng.integers(1, context) :] += int(rng.integers(most - context + 1))
    return places[None]
