"""The demo's parts: what it shows while it generates, and what it makes of the times."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "train"))
    return importlib.import_module("generate")


def test_progress_of_every_method_and_no_warning():
    options = ["--context", "300", "--tokens", "8", "--file", ROOT / "examples" / "train" / "corpus.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-W", "error::FutureWarning", ROOT / "examples" / "generate.py", *options]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "Warning" not in run.stderr + run.stdout, run.stderr
    for method in ("KeySketch()", "TopPages(1024)", "Gaussian()"):
        assert f"8 bytes by {method}" in run.stdout
    assert "by the median time of 7 steps" in " ".join(run.stdout.split())


def test_a_slow_step_does_not_count(generate, monkeypatch):
    clock = iter([0, 0.01, 1, 1.01, 2, 12, 20, 20.01, 30, 30.02])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(generate, "step", lambda model, byte, cache: byte + 1)
    told = []
    text, seconds = generate.continuation(None, 65, None, 6, told.append)
    assert text == b"ABCDEF" == bytes(told) and seconds == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_in_by_the_name_that_forward_has(generate, name):
    class Model:
        pass

    parameters = [inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY) for x in ("input_ids", name)]
    Model.forward = staticmethod(lambda **kwargs: kwargs)
    Model.forward.__signature__ = inspect.Signature(parameters)
    assert generate.with_cache(Model(), 3) == {name: 3}
