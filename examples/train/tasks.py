"""Lines that come back: what a model has to look up in its context, put into text by a seeded generator.

A fact is a line `key NAME = VALUE`. Where its name comes back, the value can be known from the first time alone. Short
values make associative recall, long ones copying.
"""

import numpy as np

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
NAME, RECALL, COPY = 6, 8, 128  # letters of a name, digits of a short and of a long value
SPACING = 512  # bytes of text for each fact that training puts into them


def question(name: bytes) -> bytes:
    """What precedes a fact's value."""
    return b"\n# key " + name + b" = "


def draw(rng: np.random.Generator, size: int = RECALL) -> tuple[bytes, bytes]:
    """A fact's question and value."""
    return question(rng.choice(LETTERS, NAME).tobytes()), rng.choice(DIGITS, size).tobytes()


def put(text: np.ndarray, at: int, line: bytes) -> None:
    """Writes a line over text at a place."""
    text[at : at + len(line)] = np.frombuffer(line, np.uint8)


def overlay(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Writes facts over text, every one twice; returns where the values that come back are, a mask like text."""
    answers = np.zeros(len(text), bool)
    slots = rng.permutation(len(text) // (SPACING // 2) - 1) * (SPACING // 2)
    for pair in np.sort(slots[: len(slots) // 2 * 2].reshape(-1, 2)):
        asked, value = draw(rng, COPY if rng.random() < 0.25 else RECALL)
        places = pair + rng.integers(SPACING // 2 - len(asked) - COPY, size=2)
        for at in places:
            put(text, at, asked + value + b"\n")
        answers[places[1] + len(asked) :][: len(value)] = True
    return answers
