"""The programs of bench/evals that decode with a model, the tables of their results, and the training of the models."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw

pytest.importorskip("transformers")
from bench.evals import end_to_end, quality, suites, tune
from bench.evals.decoding import Context, Stepper, load
from bench.examples import MODEL
from bench.report import accuracy

import corpus  # isort: skip  # bench.examples has made examples/train importable
import tasks  # isort: skip
import train  # isort: skip
import windows  # isort: skip

import entmaxkv

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(quality, "BUDGETS", (64,))
    for name, value in {"STEPS": 20, "FACTS": 4, "ASKED": 2, "LEAST_CONTEXT": 256}.items():
        monkeypatch.setattr(suites, name, value)


def told(program, monkeypatch, capsys, *arguments):
    """What a program says when it refuses its arguments."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit):
        program.main()
    return capsys.readouterr().err


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


@pytest.mark.parametrize("context", [suites.LEAST_CONTEXT, 4096])
def test_what_is_asked_for_is_in_the_context_once(context):
    text = np.random.default_rng(0).integers(32, 127, 20000).astype(np.uint8)
    for facts, asked in ((1, 1), (suites.FACTS, suites.ASKED)):
        suite = suites.asking(text, 5, context, 4096, facts, asked)
        for read, follows, answers in zip(*suite, strict=True):
            lines = follows.tobytes().split(b"\n")[1:-1]
            assert len(set(lines)) == asked and answers.sum() == asked * tasks.RECALL
            for line in lines:
                assert read.tobytes().count(b"\n" + line + b"\n") == 1
        expected = torch.from_numpy(suite.follows[:, 1:].astype(np.int64))
        assert suites.answered(suite, expected) == 1
        expected[0, np.flatnonzero(suite.answers[0, 1:])[0]] += 1
        assert suites.answered(suite, expected) == 1 - 1 / (5 * asked)


def test_a_training_window_depends_on_its_number_alone():
    documents = [bytes([65 + i]) * 999 for i in range(20)]
    one, other = (windows.Windows(documents, 0.5, seed=3) for _ in range(2))
    first = one.batch(0, 4, 512)
    assert first.shape == (4, 513) and one.digest() == other.digest()
    later = [one.batch(step, 4, 512) for step in range(30)]  # more than one pass over the text
    for step in (29, 7, 0):
        assert torch.equal(other.batch(step, 4, 512), later[step])
    changed = windows.Windows(documents, 0.5, seed=4)
    assert not torch.equal(changed.batch(0, 4, 512), first) and changed.digest() != one.digest()
    with pytest.raises(ValueError, match="expected at least 40001 bytes of text, got 20000"):
        one.row(0, 20000)


def test_positions_skip_at_most_once_and_stay_below_the_most():
    seen = [windows.positions(step, 100, 1000, seed=0)[0] for step in range(200)]
    assert {int((places.diff() != 1).sum()) for places in seen} == {0, 1}
    assert 900 < max(int(places[-1]) for places in seen) < 1000


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """A resumed run gives the same losses and parameters; with other settings it does not start."""

    def begin(**settings):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        return train.Run(tmp_path, {"seed": 0} | settings, model, [torch.optim.Adam(model.parameters())])

    def take(run, steps):
        for _ in range(steps):
            loss = (run.model(torch.full((2, 4), run.step / 10)) - 1).square().mean()
            loss.backward()
            run.optimizers[0].step()
            run.optimizers[0].zero_grad()
            run.step += 1
            run.losses.append(loss.detach())

    straight, stopped = begin(), begin()
    take(straight, 6)
    take(stopped, 3)
    stopped.seconds, stopped.log = 1.5, [{"step": 2}]
    stopped.save()
    resumed = begin()
    assert (resumed.step, resumed.seconds, resumed.log) == (3, 1.5, [{"step": 2}])
    take(resumed, 3)
    assert torch.equal(torch.stack(resumed.losses), torch.stack(straight.losses))
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True))
    with pytest.raises(SystemExit, match=r"expected seed 0, as the run began, got 1; give another --out"):
        begin(seed=1)


def test_package_texts_are_text_and_come_once(tmp_path):
    files = {"a.py": b"one", "b/c.md": b"two", "b/d.py": b"one", "e.so": b"binary", "f.py": b"a\x00b", "g.py": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert corpus.package_texts(tmp_path) == [b"one", b"two"]


def test_near_copies_of_held_out_files_are_left_out():
    lines = [b"%d " % i + b"a line that is long enough to be told apart" for i in range(40)]
    original, short = b"\n".join(lines), b"import os\n"
    few, many = b"\n".join(lines[:7]), b"\n".join([b"    " + line for line in lines[5:14]])
    assert corpus.without_copies([few, many, original, short], [original, short]) == [few, short]


@torch.no_grad()
def test_a_context_is_decoded_again_and_again():
    """Each selector decodes after the same context, as the model does when it reads the whole text."""
    model = load(MODEL, "cpu")
    text = torch.from_numpy(suites.held_out_text(corpus.default_source())[: 2 * 276].reshape(2, 276).astype(np.int64))
    context = Context(model, text[:, :256], room=20)
    logits = model(input_ids=text).logits[:, 256:-1]
    want = -logits.log_softmax(-1).gather(2, text[:, 257:, None])[..., 0] / np.log(2)
    for select in (None, entmaxkv.TopPages(10**6), entmaxkv.KeySketch(), None):
        found = Stepper(context, select).read(text[:, 256:])
        torch.testing.assert_close(found.bits, want, rtol=1e-3, atol=1e-3)
        assert torch.equal(found.argmax, logits.argmax(-1))
    stepper = Stepper(context, None)
    written = stepper.write(text[:, 256:257], 10)
    assert torch.equal(stepper.read(torch.cat([text[:, 256:257], written], dim=1)).argmax, written)
    with pytest.raises(ValueError, match="expected a context of whole pages of 16, got 250"):
        Context(model, text[:, :250], room=1)


def test_quality_measures_every_selector(small, monkeypatch, tmp_path):
    path = tmp_path / "quality.json"
    monkeypatch.setattr(sys, "argv", ["", str(MODEL), "--context", "512", "--rows", "2", "--json", str(path)])
    quality.main()
    rows = {row["select"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == set(quality.selectors(1.5)) > set(quality.selectors(1.0))
    dense, sketch, pages = (rows[name] for name in ("dense", "KeySketch()", "TopPages(64)"))
    assert dense["common_prefix"] == sketch["common_prefix"] == 20 and dense["delta"] == sketch["delta"] == 0
    assert dense["agreement"] == sketch["agreement"] == 1 and dense["bits_above"] == dense["bits_above_se"] == 0
    assert sketch["bits"] == pytest.approx(dense["bits"], abs=1e-4) and sketch["certified"] == 1
    for name in ("passkey", "recall"):
        assert sketch[name] == dense[name] and 0 <= dense[name] <= 1
    assert pages["delta"] > 0.01 and pages["tokens"] <= 64 and pages["share"] < sketch["share"] < dense["share"]
    assert pages["bits_above"] == pytest.approx(pages["bits"] - dense["bits"], abs=1e-5)
    assert np.array(dense["heads"]["support"]).shape == (6, 4) and np.array(dense["heads"]["tokens"]).shape == (6, 2)
    assert np.mean(pages["heads"]["delta"]) == pytest.approx(pages["delta"], rel=0.01)
    assert len(pages["layer_share"]) == 6


def test_programs_say_what_they_expected(monkeypatch, capsys):
    for arguments, expected in (
        ([ROOT], "expected a folder with a config.json"),
        ([MODEL, "--context", "2000000"], "expected less than the"),
        ([MODEL, "--longest", "2000000"], "--context, --longest: expected less than the"),
        ([MODEL, "--source", ROOT / "csrc"], "--source: expected a standard library with held-out files, got"),
        ([MODEL, "--context", "4100"], f"expected multiples of 16 of at least {suites.LEAST_CONTEXT}, got 4100"),
    ):
        for program in (quality, tune):
            assert expected in told(program, monkeypatch, capsys, *arguments)
    for program, first in ((quality, "'dense', 'KeySketch()', "), (tune, "'bound, 256', ")):
        refused = told(program, monkeypatch, capsys, MODEL, "--select", "box")
        assert f"--select: expected names out of {first}" in refused and "got 'box'" in refused
    if not torch.cuda.is_available():
        assert "expected a CUDA GPU, got none" in told(train, monkeypatch, capsys, "twin")
        assert "expected a CUDA GPU, got none" in told(end_to_end, monkeypatch, capsys, MODEL)


def recorded():
    """Rows like those that the programs write."""
    rows = []
    for model in (accuracy.ENTMAX, accuracy.SOFTMAX, accuracy.SHIPPED):
        for context in (4096, 16384, 131072):
            heads = {name: [[0.25, 2.0], [0.5, 30.0]] for name in ("delta", "support", "error", "tokens")}
            for select in quality.selectors(1.0 if model == accuracy.SOFTMAX else 1.5):
                measured = {"bits": 0.875, "bits_above_se": 0.002, "passkey": 0.75, "recall": 0.5, "delta": 0.25}
                measured |= {"support_recall": 0.5, "error": 0.125, "tokens": 99.0, "share": 0.0625}
                row = {"kind": "quality", "model": model, "context": context, "select": select, "common_prefix": 9.0}
                rows.append(row | measured | {"heads": heads})
        step = {"step": 10, "context": 16384, "train_bits": 1.0, "bits_16384": 1.5, "recalled_16384": 0.25}
        end = {"steps": 20, "minutes": 2.0, "bits": 1.0, "distant_bits": 1.25, "recalled": 0.5}
        rows += [{"kind": "training", "model": model, **row} for row in (step, end)]
        parts = {f"{part}_us": 10.0 for part in ("graph", "attention", "append", "other", "eager")}
        place = {"context": 131072, "batch": 8, "select": "dense", "tokens_per_s": 800.0}
        rows.append({"kind": "end to end", "model": model, **place, **parts})
        rows.append(rows[-1] | {"batch": 1, "tokens_per_s": 700.0})
    tuned = {"tokens": 64.0, "delta": 0.125, "passkey": 1.0, "recall": 0.5}
    for text in ("training", "held-out"):
        place = {"kind": "tune", "model": accuracy.ENTMAX, "text": text, "context": 4096}
        for select in ("box at 0.6 - all, 256", "box at 0.6 - all, 1024", "Gaussian(quantile=0.95, margin=0.25)"):
            rows.append(place | {"select": select} | tuned)
    rows.append(place | {"text": "training", "context": 8192, "select": "bound, 1024"} | tuned)
    return rows


def test_tables_and_figures_of_accuracy(tmp_path):
    report = {"machine": {"gpu": "a GPU", "torch": "2", "commit": "abc"}, "rows": recorded()}
    (tmp_path / "a.json").write_text(json.dumps(report))
    report["rows"] = [row | {"bits": 0.5} for row in recorded()[:1]]
    (tmp_path / "b.json").write_text(json.dumps(report))
    rows = accuracy.load(tmp_path)
    assert len(rows) == len(recorded())
    tables = {name: made(rows) for name, made in accuracy.TABLES.items()}
    assert all(text.endswith("a GPU, torch 2, commit abc") for text in tables.values())
    assert (
        "| `TopPages(64)` | 0.875 ± 0.002 | 75% | 50% | 9 | 0.25 | 0.500 | 0.12 | 99 | 6.2% |" in tables["quality_16K"]
    )
    assert "| entmax | dense | 0.500 | 0.875 | 0.875 |" in tables["contexts_bits"]
    assert "| entmax | dense | 75% | 75% | 75% |" in tables["contexts_passkey"]
    assert "| `TopPages(64)` | softmax | 0.12 | 0.12 | 0.12 |" in tables["twins_error"]
    assert "| entmax | dense | 0.000 | 12 | 32 | 0.25 | 6% | 700 | 800 |" in tables["choice"]
    assert (
        "| merit | 4K, training: δ | 4K, training: passkeys | 4K, training: values | 4K, held-out: δ |"
        in tables["merits"]
    )
    assert "| box at 0.6 - all | 0.12 | 100% | 50% | 0.12 | 100% | 50% |  |  |  |" in tables["merits"]
    assert "| 4K | held-out | 0.95 | 0.25 | 64 | 0.12 | 100% | 50% |" in tables["quantiles"]
    assert "| entmax | 8 rows of 128K | dense | 800 | 10 | 10 | 10 | 10 | 10 |" in tables["end_to_end"]
    assert all(made(rows) for made in accuracy.FIGURES.values())
    assert not any(made([]) for made in (*accuracy.TABLES.values(), *accuracy.FIGURES.values()))


@pytest.fixture
def cache():
    cache = entmaxkv.PagedKVCache(1, 900, 2, 64)
    cache.append(*(draw(1, 700, 2, 64, seed=seed) for seed in (0, 1)))
    return cache


def test_merits_rank_as_the_library_does(cache):
    q = draw(1, 2, 64, seed=2)  # groups of one head
    ways = tune.Merit("box at 0.6", 128), entmaxkv.TopPages(128)
    got, want = (select.select(q, cache, entmaxkv.Scoring())[:2] for select in ways)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    q = draw(1, 8, 64, seed=2) * torch.logspace(0, 1, 4).repeat(2)[:, None]
    taken = entmaxkv.TopPages(128).select(q, cache, entmaxkv.Scoring()).selected.long()
    for name, same in (("all", True), ("best", False)):
        merits = tune.Merit(f"box at 0.6 - {name}", 128).merits(q, cache, entmaxkv.Scoring())
        worst, rest = merits.gather(2, taken).amin(2), merits.scatter(2, taken, -torch.inf).amax(2)
        assert (worst > rest - 0.06).all() == same  # in z, as far as the op's exp and log are not the exact ones


def test_merits_select_pages(cache):
    q = draw(1, 8, 64, seed=2)
    for name in tune.MERITS:
        pages, counts, *_ = tune.Merit(name, 128).select(q, cache, entmaxkv.Scoring())
        assert (
            pages.shape == (1, 2, 8)
            and (counts == 8).all()
            and (pages.diff() > 0).all()
            and (pages[..., -1] == 43).all()
        )


def test_the_mixture_threshold_solves_its_equation():
    mean, std = torch.randn(2, 3, 40, dtype=torch.float64), torch.rand(2, 3, 40, dtype=torch.float64)
    counts = torch.full_like(mean, 16)
    tau = tune.mixture_threshold(mean, std, counts)
    mass = (counts * tune.expected_weight(mean - tau[..., None], std)).sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-9, atol=1e-9)
    samples = mean[..., None] + std[..., None] * torch.randn(*mean.shape, 200_000, dtype=torch.float64)
    drawn = (samples - tau[..., None, None]).clamp_min(0).square().mean(-1)
    torch.testing.assert_close((counts * drawn).sum(-1), torch.ones_like(mass), rtol=0.05, atol=0.05)
