"""Key-value lines that come back: what a model has to look up in its context, put into text by a seeded generator.

A fact is a line `# key NAME = VALUE`. Where its name comes back, the value can be known from the first time alone.
Short values make associative recall, long ones copying.
"""

import numpy as np

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
NAME, RECALL, COPY = 6, 8, 128  # letters of a name, digits of a short and of a long value
COPIES = 0.25  # share of the facts with long values
SPACING = 512  # bytes of text for each fact that training puts into them


def question(name: bytes) -> bytes:
    """What precedes a fact's value."""
    return b"\n# key " + name + b" = "


def draw(rng: np.random.Generator, size: int = RECALL) -> tuple[bytes, bytes]:
    """A fact's question and value."""
    return question(rng.choice(LETTERS, NAME).tobytes()), rng.choice(DIGITS, size).tobytes()


LINE = len(question(b"." * NAME)) + RECALL + 1  # bytes of a fact with a short value


def put(text: np.ndarray, at: int, line: bytes) -> None:
    """Writes a line over text at a place."""
    text[at : at + len(line)] = np.frombuffer(line, np.uint8)


def overlay(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Writes facts over text, every one twice; returns where the values that come back are, a mask like text."""
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
