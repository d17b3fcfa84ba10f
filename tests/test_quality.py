"""bench/quality.py, bench/tune.py and what the example models are trained on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
BENCH = str(ROOT / "bench")
sys.path += [entry for entry in (BENCH, str(ROOT / "examples" / "train")) if entry not in sys.path]
import accuracy  # noqa: E402
import corpus  # noqa: E402
import quality  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
import tune  # noqa: E402
from decoding import Context, Stepper, load  # noqa: E402

import entmaxkv  # noqa: E402

MODEL = ROOT / "examples" / "stdlib-entmax"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(quality, "ROWS", {"text": 2, "passkey": 2, "recall": 2})
    monkeypatch.setattr(quality, "STEPS", 20)
    monkeypatch.setattr(quality, "FACTS", 4)
    monkeypatch.setattr(quality, "ASKED", 2)
    monkeypatch.setattr(quality, "BUDGETS", (64,))


def test_facts_come_back_where_the_answers_are():
    text = np.full(8192, ord("."), np.uint8)
    answers = tasks.overlay(text, np.random.default_rng(0))
    lines = [line for line in text.tobytes().decode().split("\n") if line.startswith("# key")]
    assert len(lines) == 2 * len(set(lines)) > 20
    starts = np.flatnonzero(np.diff(answers.astype(int)) == 1) + 1
    assert len(starts) == len(set(lines))
    for start in starts:
        value = text[start:].tobytes().split(b"\n")[0]
        assert answers[start : start + len(value)].all() and len(value) in (tasks.RECALL, tasks.COPY)
        question = text[start - len(tasks.question(b"." * tasks.NAME)) : start].tobytes()
        assert text[: start - len(question)].tobytes().count(question + value) == 1


def test_a_training_window_depends_on_its_number_alone():
    documents = [bytes([65 + i]) * 999 for i in range(20)]
    one, other = (train.Windows(documents, 0.5, seed=3) for _ in range(2))
    first = one.batch(0, 4, 512)
    assert first.shape == (4, 513)
    later = [one.batch(step, 4, 512) for step in range(30)]  # more than one pass over the text
    for step in (29, 7, 0):
        assert torch.equal(other.batch(step, 4, 512), later[step])
    assert not torch.equal(train.Windows(documents, 0.5, seed=4).batch(0, 4, 512), first)


def test_positions_skip_at_most_once_and_stay_below_the_most():
    seen = [train.positions(step, train.CONTEXT, 131072, seed=0)[0] for step in range(40)]
    skips = [int((places.diff() != 1).sum()) for places in seen]
    assert set(skips) == {0, 1} and max(int(places[-1]) for places in seen) in range(train.CONTEXT, 131072)
    assert torch.equal(train.positions(0, 4096, 131072, seed=0)[0], torch.arange(4096))


def test_package_texts_are_text_and_come_once(tmp_path):
    files = {"a.py": b"one", "b/c.md": b"two", "b/d.py": b"one", "e.so": b"binary", "f.py": b"a\x00b", "g.py": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert corpus.package_texts(tmp_path) == [b"one", b"two"]


@torch.no_grad()
def test_a_context_is_decoded_again_and_again():
    """By any selector, and as the model itself reads the whole."""
    model = load(MODEL, "cpu")
    text = torch.from_numpy(quality.held_out_text(corpus.default_source())[: 2 * 276].reshape(2, 276).astype(np.int64))
    context = Context(model, text[:, :256], room=20)
    logits = model(input_ids=text).logits[:, 256:-1]
    want = -logits.log_softmax(-1).gather(2, text[:, 257:, None])[..., 0] / np.log(2)
    for select in (None, entmaxkv.TopPages(10**6), entmaxkv.KeySketch(), None):
        found = Stepper(context, select).read(text[:, 256:])
        torch.testing.assert_close(found.bits, want, rtol=1e-3, atol=1e-3)
        assert torch.equal(found.likeliest, logits.argmax(-1))
    stepper = Stepper(context, None)
    written = stepper.write(text[:, 256:257], 10)
    assert torch.equal(stepper.read(torch.cat([text[:, 256:257], written], dim=1)).likeliest, written)
    with pytest.raises(ValueError, match="expected a context of whole pages of 16, got 250"):
        Context(model, text[:, :250], room=1)


def test_quality_measures_every_selector(small, monkeypatch, tmp_path, capsys):
    path = tmp_path / "quality.json"
    monkeypatch.setattr(sys, "argv", ["quality.py", str(MODEL), "--context", "512", "--json", str(path)])
    quality.main()
    rows = {row["select"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == set(quality.selectors(1.5)) > set(quality.selectors(1.0))
    dense, sketch, pages = (rows[name] for name in ("dense", "KeySketch()", "TopPages(64)"))
    assert dense["same"] == sketch["same"] == 20 and dense["delta"] == sketch["delta"] == 0
    assert sketch["bits"] == pytest.approx(dense["bits"], abs=1e-4) and sketch["certified"] == 1
    for name in ("passkey", "recall"):
        assert sketch[name] == dense[name] and 0 <= dense[name] <= 1
    assert pages["delta"] > 0.01 and pages["tokens"] <= 64 and pages["share"] < sketch["share"] < dense["share"]
    assert np.array(dense["heads"]["support"]).shape == (6, 4) and np.array(dense["heads"]["tokens"]).shape == (6, 2)
    assert accuracy.TABLES["quality_shipped"]([row | {"machine": {}} for row in rows.values()]) == ""


def test_quality_says_what_it_expected(monkeypatch, capsys):
    for arguments, expected in (
        ([str(ROOT)], "expected a folder with a config.json"),
        ([str(MODEL), "--context", "2000000"], "expected contexts shorter than the"),
    ):
        monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
        with pytest.raises(SystemExit):
            quality.main()
        assert expected in capsys.readouterr().err


def test_merits_rank_as_the_library_does():
    cache = entmaxkv.PagedKVCache(1, 704, 2, 64)
    cache.append(*(torch.randn(1, 700, 2, 64) for _ in range(2)))
    q = torch.randn(1, 8, 64)
    for name, select in (("bound - best", entmaxkv.TopPages(128)),):
        got, want = tune.Merit(name, 128).pages(q, cache), select.pages(q, cache)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_mixture_threshold_solves_its_equation():
    mean, std = torch.randn(2, 3, 40, dtype=torch.float64), torch.rand(2, 3, 40, dtype=torch.float64)
    counts = torch.full_like(mean, 16)
    tau = tune.mixture_threshold(mean, std, counts, 1.5)
    mass = (counts * tune.expected_weight(mean - tau[..., None], std)).sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-9, atol=1e-9)
    samples = mean[..., None] + std[..., None] * torch.randn(*mean.shape, 200_000, dtype=torch.float64)
    drawn = (samples - tau[..., None, None]).clamp_min(0).square().mean(-1)
    torch.testing.assert_close((counts * drawn).sum(-1), torch.ones_like(mass), rtol=0.05, atol=0.05)
