"""The programs of bench run, and their error messages name the wrong argument."""

import importlib
import json
import shlex
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
from bench import authors, inputs, model_text, profile_decode, timing
from bench.report import tables

SMALL = shlex.split("--context 300 2x128 --dtype bf16 --heads 4/2 --head-dim 64 --budget 64 --repeats 1")


def run(program, monkeypatch, *arguments):
    """Runs a program of bench in this process, with arguments as on the command line."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    importlib.import_module(f"bench.{program}").main()


def refused(program, monkeypatch, capsys, *arguments):
    """The error message of a program that ends without a result."""
    with pytest.raises(SystemExit) as ended:
        run(program, monkeypatch, *arguments)
    assert ended.value.code not in (None, 0)
    return f"{capsys.readouterr().err}{ended.value.code}"


def test_decode_writes_a_row_for_each_method(monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    run("decode", monkeypatch, *SMALL, "--keys", *inputs.KEYS, "--json", path)
    report = json.loads(path.read_text())
    assert {"cpu", "threads", "torch", "commit", "read_gb_per_s"} == set(report["machine"])
    rows = report["rows"]
    assert {(row["keys"], row["batch"], row["context"]) for row in rows} == {
        (keys, *shape) for keys in inputs.KEYS for shape in ((1, 300), (2, 128))
    }
    here = [row for row in rows if (row["keys"], row["batch"]) == ("model", 1)]
    steps = tables.steps(here)
    selecting = ["KeySketch()", "TopPages(64)", "Gaussian, 64 tokens", "Gaussian()"]
    assert list(steps) == ["softmax SDPA", "dense softmax", "dense entmax", *selecting]
    names = {*inputs.Case.__dataclass_fields__, "alpha", "kind", "method", "timed", "us"}
    for row in rows:
        measured = {"bytes", "gb_per_s", "floor_us", "fraction"}
        of_kind = {"of"} if row["kind"] == "op" else {"ratio", "error"}
        assert names | measured | of_kind <= set(row)
        assert row["us"] > 0 and row["fraction"] == pytest.approx(row["floor_us"] / row["us"], rel=1e-4)
    for name in ("dense softmax", "dense entmax", *selecting):
        assert {"delta", "tokens", "certified"} <= set(steps[name])
    for row in rows:
        if row["method"] in ("dense entmax", "KeySketch()"):
            assert row["delta"] == 0 and row["certified"] == 1 and row["error"] < 0.01
    assert steps["softmax SDPA"]["error"] < 0.01 and steps["softmax SDPA"]["ratio"] == 1
    assert steps["TopPages(64)"]["tokens"] <= 64
    assert steps["Gaussian, 64 tokens"]["tokens"] == pytest.approx(64, abs=16)
    ops = [(row["of"], row["method"]) for row in here if row["kind"] == "op"]
    assert ops == [
        ("KeySketch()", "select_sketch"),
        ("KeySketch()", "sparse_decode"),
        ("TopPages(64)", "score_pages"),
        ("TopPages(64)", "select_pages"),
        ("TopPages(64)", "sparse_decode"),
        *((name, op) for name in selecting[2:] for op in ("score_gaussian", "select_gaussian", "sparse_decode")),
        ("one token", "append_kv"),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--budget", "0"], "expected a whole number of at least 1, got '0'"),
        (["--context", "4x"], "expected tokens such as 32768, or rows of them such as 16x32768, got '4x'"),
        (["--heads", "3/2"], "expected query and KV heads such as 32/8"),
        (["--alpha", "3"], "expected --alpha in [1, 2], got 3.0"),
        (["--json", "nowhere/out.json"], "expected a file in a directory that exists, got nowhere/out.json"),
        (["--reference", "."], "--reference: expected --device cuda"),
        (["--keys", "model", "--head-dim", "80"], "expected --head-dim to be a multiple of 64, got 80"),
    ],
)
def test_decode_says_what_it_expected(arguments, expected, monkeypatch, capsys):
    assert expected in refused("decode", monkeypatch, capsys, *arguments)


def test_certify_finds_no_miss_and_its_figure_is_drawn(recorded_results, monkeypatch, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    file = {f"a.{x}": torch.randn(100, 64) for x in "kv"} | {"a.q": 3 * torch.randn(2, 8, 64)}
    save_file(file, tmp_path / "file.safetensors")
    options = ["--context", 128, "--cases", 1, "--max-tokens", 8, "--json", tmp_path / "certify.json"]
    run("evals.certify", monkeypatch, tmp_path / "file.safetensors", *options)
    rows = json.loads((tmp_path / "certify.json").read_text())["rows"]
    exact = [row for row in rows if row["kind"] == "exact"]
    kinds = ["file", "model", "normal", "clustered", "outlier", "adversarial"]
    assert [row["keys"] for row in exact[::3]] == kinds
    assert [row["cases"] for row in exact[::3]] == [16] + 5 * [1024]
    for row in exact:
        assert row["broken_bounds"] == 0
        if row["select"] != "1 - 1e-9":
            assert row["misses"] == row["other_supports"] == row["delta"] == 0 and row["certified"] == 1
            assert row["out_off"] < 0.01 and row["tau_off"] < 0.01
    delta = [row for row in rows if row["kind"] == "delta"]
    assert [row["select"] for row in delta] == 2 * ["KeySketch", "TopPages", "Gaussian"]
    assert [row["broken_bounds"] for row in delta] == 6 * [0]
    run("report.plot", monkeypatch, *recorded_results)
    assert (tmp_path / "sketch.png").exists()


def test_certify_says_what_it_expected(monkeypatch, capsys):
    assert "expected an activations file or --keys, got neither" in refused(
        "evals.certify", monkeypatch, capsys, "--keys"
    )


def test_figures_without_key_sketch_have_no_place_for_it(recorded_results, tmp_path, monkeypatch):
    """Results from before KeySketch existed still give figures and tables."""
    for name in ("gpu", "cpu"):
        report = json.loads((tmp_path / f"{name}.json").read_text())
        report["rows"] = [row for row in report["rows"] if tables.SKETCH not in (row["method"], row.get("of"))]
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    run("report.plot", monkeypatch, *recorded_results)
    assert tables.SKETCH not in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def model_inputs():
    cases = [inputs.Case("model", "fp32", *shape) for shape in ((4, 2, 64, 16, 2, 100), (14, 7, 128, 16, 1, 70))]
    text = model_text.ModelText(cases, "cpu", model_text.Console(quiet=True))
    return [(case, text.inputs(case)) for case in cases]


def test_model_keys_have_the_case_s_shape(model_inputs):
    for case, (q, k, v) in model_inputs:
        assert q.shape == (case.batch, case.heads, case.head_dim)
        assert k.shape == v.shape == (case.batch, case.context, case.kv_heads, case.head_dim)
        assert all(x.isfinite().all() and x.std() > 0.1 for x in (q, k, v))


def test_model_keys_are_the_model_s(model_inputs):
    """A wider head is two heads of the model side by side; further heads come from the next text."""
    (_, narrow), (_, wide) = model_inputs
    assert torch.equal(wide.k[0, :, 0, :64], narrow.k[0, -70:, 0])
    assert torch.equal(wide.k[0, :, 0, 64:], narrow.k[0, -70:, 1])
    assert torch.equal(wide.q[0, :2, :64], narrow.q[0, :2]) and torch.equal(wide.q[0, :2, 64:], narrow.q[0, 2:])
    assert torch.equal(wide.v[0, :, 6, :64], narrow.v[1, -70:, 0])


def test_medians_leave_out_the_first_round(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) ** 2 / 1e6)
    (found,) = timing.medians({"a": lambda: None}, 3, "cpu").values()
    assert found.us == pytest.approx(9) and found.of == "call"  # of 1, 5, 9 and 13


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which the authors' code cannot run")
def test_authors_who_cannot_run_are_a_note(tmp_path):
    given = inputs.drawn(inputs.Case("normal", "bf16", 2, 1, 16, 16, 1, 32), "cpu")._asdict()
    results, failures = authors.authors(tmp_path, given, page_size=16, budgets=[16], alpha=1.5, repeats=1)
    assert results == {} and list(failures) == ["the authors' entmaxkv"]


def test_profile_decode_names_each_op(monkeypatch, capsys):
    run("profile_decode", monkeypatch, *shlex.split("--context 200 --heads 4/2 --head-dim 64 --steps 1"))
    shown = capsys.readouterr().out
    ops = [
        "dense.dense_decode",
        "KeySketch.select_sketch",
        "TopPages.score_pages",
        "TopPages.sparse_decode",
        "Gaussian.select_gaussian",
    ]
    assert all(name in shown for name in ops)
    nsys, ncu = profile_decode.commands(ops, ["bench/profile_decode.py", "--device", "cuda"])
    assert nsys.startswith("nsys profile --trace cuda,nvtx") and nsys.endswith("bench/profile_decode.py --device cuda")
    assert "--clock-control none --nvtx --nvtx-include dense.dense_decode/ " in ncu


def test_profile_decode_takes_one_case(monkeypatch, capsys):
    assert "expected one case, got 2" in refused("profile_decode", monkeypatch, capsys, "--batch", "1", "2")


def recorded(device):
    """A report like those of bench/decode.py, with two contexts and two kinds of keys."""
    softmax = "softmax SDPA, cuDNN" if device == "gpu" else "softmax SDPA"
    machine = {"torch": "2", "commit": "abc", "read_gb_per_s": 4000.0, device: "a processor", "threads": 1}
    rows = []
    for keys in ("model", "normal"):
        for dtype in ("fp32", "bf16"):
            for context in (1024, 2048):
                shape = {"keys": keys, "dtype": dtype, "batch": 1, "context": context}
                shape |= tables.SHAPE | {"timed": "call", "us": 10.0, "bytes": 100, "fraction": 0.5}
                step = shape | {"kind": "step", "ratio": 0.5, "error": 0.1}
                rows += [step | {"alpha": 1, "method": softmax}, step | {"alpha": 1, "method": "dense softmax"}]
                rows += [step | {"alpha": 1.5, "method": name, "delta": 0.25} for name in tables.OWN]
                rows += [shape | {"alpha": 1.5, "kind": "op", "method": op, "of": of} for op, of in tables.OPS.items()]
    return {"machine": machine, "rows": rows}


@pytest.fixture
def recorded_results(tmp_path):
    for device in ("gpu", "cpu"):
        (tmp_path / f"{device}.json").write_text(json.dumps(recorded(device)))
    report = recorded("gpu")
    ours = next(row | {"us": 8.0, "tokens": 1024.0} for row in report["rows"] if row["method"] == "dense entmax")
    report["rows"] = [ours, ours | {"method": "authors, dense entmax", "dtype": "fp16", "us": 70.0}]
    (tmp_path / "authors.json").write_text(json.dumps(report))
    (tmp_path / "tests.json").write_text(json.dumps({"machine": {}, "rows": [{"passed": 3}]}))
    readme = tmp_path / "README.md"
    readme.write_text("".join(f"<!-- bench:{name} -->\nold\n<!-- /bench -->\n" for name in tables.TABLES))
    return ["--results", tmp_path, "--pages", readme]


def test_plot_draws_figures_and_writes_tables(recorded_results, tmp_path, monkeypatch, capsys):
    assert "expected the tables of" in refused("report.plot", monkeypatch, capsys, *recorded_results, "--check")
    assert not list(tmp_path.glob("*.png"))
    run("report.plot", monkeypatch, *recorded_results)
    assert {path.name for path in tmp_path.glob("*.png")} == {"steps.png", "floor.png", "delta.png", "cpu.png"}
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text
    assert "| model, 2K | 10.0 | 10.0 | 2.00 | 10.0 | 2.00 | 0.25 |" in text
    assert "| model, 1K | 10.0 (50%) |" in text
    assert "a processor, torch 2, commit abc, 4000 GB/s" in text
    assert "| model, 1K | dense entmax | 8.0 | 1024 | 0.10 |" in text
    assert "| model, 1K | authors, dense entmax | 70.0 | 1024 | 0.10 |" in text
    assert "| `KeySketch()` | yes, proved | 10.0 | 2.00 | 100% | 0.25 | 10.0 | 2.00 | 100% | 0.25 |" in text
    run("report.plot", monkeypatch, *recorded_results, "--check")


def test_tables_of_certificates():
    row = {"kind": "exact", "keys": "normal", "tokens": 1024, "select": "certain", "cases": 100, "certified": 1.0}
    row |= {"misses": 0, "candidates_share": 0.25, "bytes_share": 0.5, "machine": {"gpu": "a GPU", "torch": "2"}}
    rows = [row, row | {"cases": 300, "misses": 2, "certified": 0.5}]
    for select in ("KeySketch", "TopPages", "Gaussian"):
        rows.append(row | {"kind": "delta", "select": select, "max_tokens": 64, "delta": 0.125})
    made = {name: table(rows) for name, table in tables.TABLES_OF_CERTIFIED.items()}
    assert "| i.i.d. | 1K | `KeySketch()` | 400 | 62.5% | 2 | 25.0% | 50.0% |" in made["certified"]
    assert "| i.i.d. | 1K | 64 | 50.0% | 0.12 | 50.0% | 0.12 | 50.0% | 0.12 |" in made["equal_bytes"]


def test_the_pages_have_the_committed_figures(monkeypatch):
    run("report.plot", monkeypatch, "--check")


def test_plot_says_what_it_expected(recorded_results, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:speed -->\n<!-- /bench -->")
    said = refused("report.plot", monkeypatch, capsys, *recorded_results)
    assert "expected bench:NAME to be one of summary, steps, ops, peers, authors, cpu, " in said
    assert said.strip().endswith("got bench:speed")
    (tmp_path / "gpu.json").unlink()
    readme.write_text("<!-- bench:ops -->\n<!-- /bench -->")
    assert "bench:ops: expected rows for it in the results" in refused(
        "report.plot", monkeypatch, capsys, *recorded_results
    )
    for name in ("cpu", "authors"):
        (tmp_path / f"{name}.json").unlink()
    assert "expected JSON of bench/decode.py, got none in" in refused(
        "report.plot", monkeypatch, capsys, *recorded_results
    )
