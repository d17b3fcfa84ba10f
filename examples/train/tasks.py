"""Facts: key-value lines that a model has to look up in its context. A seeded generator writes them over a text.

A fact is a line `# key NAME = VALUE`. Where its name comes back, the value is known only from the first time. Short
values test associative recall, long values copying.
"""

import numpy as np

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
NAME, RECALL, COPY = 6, 8, 128  # letters of a name, digits of a short and of a long value
COPIES = 0.25  # fraction of the facts with long values
SPACING = 512  # bytes of training text per fact


def question(name: bytes) -> bytes:
    """The part of a fact before its value."""
    return b"\n# key " + name + b" = "


def draw(rng: np.random.Generator, size: int = RECALL) -> tuple[bytes, bytes]:
    """Draws the question and the value of a fact."""
    return question(rng.choice(LETTERS, NAME).tobytes()), rng.choice(DIGITS, size).tobytes()


LINE = len(question(b"." * NAME)) + RECALL + 1  # bytes of a fact with a short value


def put(text: np.ndarray, at: int, line: bytes) -> None:
    """Writes a line over the text, from position `at` on."""
    text[at : at + len(line)] = np.frombuffer(line, np.uint8)


def overlay(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Writes facts over the text, each at two places; returns a mask of the values at the second places."""
    answers = np.zeros(len(text), bool)
    slot = SPACING // 2
    starts = slot * rng.permutation(len(text) // slot)
    for pair in np.sort(starts[: len(starts) // 2 * 2].reshape(-1, 2)):
        asked, value = draw(rng, COPY if rng.random() < COPIES else RECALL)
        line = asked + value + b"\n"
        places = pair + rng.integers(slot - len(line), size=2)
        for at in places:
            put(text, at, line)
        answers[places[1] + len(asked) :][: len(value)] = True
    return answers
