"""What quality.py, tune.py and end_to_end.py decode: held-out text, and texts with facts that are asked for.

A fact is a line `# key NAME = VALUE` (examples/train/tasks.py). An answer counts if every digit of the value is right.
"""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

import entmaxkv
from bench.evals.decoding import Context, Stepper
from bench.examples import LINE, RECALL, RELATED, SEPARATOR, Watch, draw, files, held_out, put
from entmaxkv.metrics import Metrics, measure

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

STEPS = 256  # decoded bytes of each text
FACTS, ASKED = 32, 8
LEAST_CONTEXT = 2 * FACTS * LINE
PROBED_ROWS, PROBED_STEPS = 8, 2
SEED = 2**33  # seed of the facts; the seeds of training are smaller


def held_out_text(source: Path) -> Bytes:
    """The held-out files of the standard library, joined. Files with near relatives in the training text come last."""
    names = {name: path for name, path in files(source).items() if held_out(name)}
    order = sorted(names, key=lambda name: (name.startswith(RELATED), name))
    return np.frombuffer(b"".join(names[name].read_bytes() + SEPARATOR for name in order), np.uint8)


class Suite(NamedTuple):
    """Texts to decode.

    Attributes:
        read: [rows, context] uint8, contexts that are read first.
        follows: [rows, steps + 1] uint8, what is decoded after them.
        answers: like `follows`, bool, whether a byte belongs to an answer.
    """

    read: Bytes
    follows: Bytes
    answers: Mask


def haystacks(text: Bytes, rows: int, context: int, longest: int) -> tuple[Bytes, Bytes]:
    """Windows [rows, context] and the STEPS + 1 bytes after each; these are the same bytes for every context."""
    ends = np.linspace(longest, len(text) - STEPS - 1, rows).astype(int)
    return np.stack([text[end - context : end] for end in ends]), np.stack([text[end:][: STEPS + 1] for end in ends])


def asking(text: Bytes, rows: int, context: int, longest: int, facts: int, asked: int, seed: int = SEED) -> Suite:
    """Contexts with facts spread over them, some of which are asked for.

    If there is one fact, its place differs from row to row.
    """
    read = haystacks(text, rows, context, longest)[0].copy()
    follows: list[bytes] = []
    answers: list[list[bool]] = []
    for row, window in enumerate(read):
        rng = np.random.default_rng((seed, facts, row))
        drawn = [draw(rng) for _ in range(facts)]
        room = context // facts
        for i, (question, value) in enumerate(drawn):
            depth = (row + 0.5) / rows if facts == 1 else rng.random()
            put(window, i * room + int(depth * (room - LINE)), question + value + b"\n")
        chosen = [drawn[i] for i in rng.permutation(facts)[:asked]]
        follows.append(b"".join(question + value for question, value in chosen) + b"\n")
        marks = [[False] * len(question) + [True] * len(value) for question, value in chosen]
        answers.append([mark for line in marks for mark in line] + [False])
    return Suite(read, np.stack([np.frombuffer(line, np.uint8) for line in follows]), np.array(answers))


def prepared(text: Bytes, context: int, longest: int, rows: int, seed: int = SEED) -> dict[str, Suite]:
    """The suites for one context; what follows a context is the same for all contexts up to `longest`."""
    read, follows = haystacks(text, rows, context, longest)
    return {
        "text": Suite(read, follows, np.zeros(follows.shape, bool)),
        "passkey": asking(text, 2 * rows, context, longest, 1, 1, seed),
        "recall": asking(text, rows, context, longest, FACTS, ASKED, seed),
    }


def tensor(x: Bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(x.astype(np.int64)).to(device)


def answered(suite: Suite, argmax: Tensor) -> float:
    """The fraction of the answers of which every byte is the argmax."""
    expected = suite.follows[:, 1:][suite.answers[:, 1:]].reshape(-1, RECALL)
    got = argmax.cpu().numpy()[suite.answers[:, 1:]].reshape(-1, RECALL)
    return float((expected == got).all(axis=1).mean())


def answering(
    model: PreTrainedModel, suite: Suite, methods: dict[str, Any], at_a_time: int, advance: Callable[[], object]
) -> dict[str, float]:
    """`answered` for each method, decoding `at_a_time` rows together."""
    found = dict.fromkeys(methods, 0.0)
    for start in range(0, len(suite.read), at_a_time):
        rows = slice(start, start + at_a_time)
        part = Suite(suite.read[rows], suite.follows[rows], suite.answers[rows])
        read = Context(model, tensor(part.read, model.device), room=part.follows.shape[1])
        follows = tensor(part.follows, model.device)
        for method, select in methods.items():
            argmax = Stepper(read, select).read(follows).argmax
            found[method] += answered(part, argmax) * len(part.read) / len(suite.read)
            advance()
    return found


def probed(context: Context, suite: Suite, methods: dict[str, Any]) -> dict[str, list[list[Metrics]]]:
    """Each method's metrics at some steps of the text, [layer][step], for the first PROBED_ROWS rows."""
    found: dict[str, list[list[Metrics]]] = {name: [[] for _ in context.layers] for name in methods}
    layers = itertools.cycle(range(len(context.layers)))
    at = {(2 * i + 1) * STEPS // (2 * PROBED_STEPS) for i in range(PROBED_STEPS)}

    def see(q: Tensor, cache: entmaxkv.PagedKVCache, scoring: entmaxkv.Scoring) -> None:
        layer = next(layers)
        if step not in at:
            return
        rows = copy.copy(cache)
        rows.batch = min(PROBED_ROWS, cache.batch)
        rows.page_table, rows.seq_lens = cache.page_table[: rows.batch], cache.seq_lens[: rows.batch]
        for name, select in methods.items():
            found[name][layer].append(measure(q[: rows.batch], rows, select=select, **vars(scoring)))

    stepper = Stepper(context, Watch(see), eager=True)
    follows = tensor(suite.follows, context.model.device)
    for step in range(max(at) + 1):
        stepper.ids.copy_(follows[:, step : step + 1])
        stepper.step()
    return found


def by_head(found: list[list[Metrics]], name: str) -> Tensor:
    """A metric's mean over steps and rows, [layers, heads] float64."""
    layers = [torch.stack([getattr(step, name).double().mean(0) for step in layer]).mean(0) for layer in found]
    return torch.stack(layers).cpu()


def share(steps: list[Metrics]) -> float:
    """Bytes read as a fraction of the bytes of the cache."""
    return sum(step.bytes_read for step in steps) / sum(step.kv_bytes for step in steps)


def facts_of(found: list[list[Metrics]]) -> dict[str, Any]:
    """The means of a selector's metrics, the metrics of each layer's heads, and the bytes of each layer."""
    names = {
        "delta": "dropped_mass",
        "support_recall": "support_recall",
        "error": "output_error",
        "tokens": "tokens",
        "support": "support",
    }
    heads = {name: by_head(found, metric) for name, metric in names.items()}
    means = {name: x.mean().item() for name, x in heads.items()}
    rounded = {name: [[float(f"{x:.3g}") for x in layer] for layer in x.tolist()] for name, x in heads.items()}
    return {
        **means,
        "share": share([step for layer in found for step in layer]),
        "certified": by_head(found, "certified").mean().item(),
        "layer_share": [float(f"{share(layer):.3g}") for layer in found],
        "heads": rounded,
    }
