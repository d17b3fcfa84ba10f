"""The CUDA kernels where there is no GPU: compiled as C++, run by the CPU (tests/emulation), put to the ops' tests."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    WRONG_ALPHAS,
    WRONG_IDS,
    alpha_calls,
    assert_same_bits,
    check_hostile,
    check_wrong_alpha,
    disordered_calls,
    hard_selections,
    hostile_calls,
)
from emulation.build import BUILD, OPS, build

import entmaxkv

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="threads are switched in x86-64 assembly")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return build(Path(entmaxkv.__file__).parent)


def run(environment: dict[str, str], folder: Path, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_copy_is_what_runs(environment, tmp_path):
    run(environment, tmp_path, "-c", f"import entmaxkv; assert entmaxkv.__file__.startswith({str(BUILD)!r})")


@pytest.mark.parametrize("op", OPS)
def test_op(environment, op, tmp_path):
    test = str(HERE / f"test_{op}.py")
    run(environment, tmp_path, "-m", "pytest", "-q", "-x", "-m", "not cuda", "-p", "no:cacheprovider", test)


SELECT = """
import torch, entmaxkv
calls = torch.load("calls.pt")
torch.save([torch.ops.entmaxkv.select_pages(*call) for call in calls], "selections.pt")
"""


def test_select_pages_chooses_what_the_cpu_chooses(environment, tmp_path):
    """From the same scores, bit for bit, whatever ties and special numbers are among them."""
    calls = [call for pages in (1, 2, 1024, 2049, 8705, 20481) for call in hard_selections(pages)]
    torch.save(calls, tmp_path / "calls.pt")
    run(environment, tmp_path, "-c", SELECT)
    for call, got in zip(calls, torch.load(tmp_path / "selections.pt"), strict=True):
        assert_same_bits(got, torch.ops.entmaxkv.select_pages(*call))


TRUST = """
import torch
torch.ops.load_library("{}")
torch.save([getattr(torch.ops.entmaxkv, op)(*arguments) for op, *arguments in torch.load("calls.pt")], "results.pt")
"""


@pytest.mark.parametrize("alpha", WRONG_ALPHAS, ids=str)
def test_a_wrong_alpha_of_a_head_ends_in_nan(environment, alpha, tmp_path):
    """Nobody has looked at head_alpha: its head has no result, selections end, and other heads have what they had."""
    calls = {}
    for name, value in (("good", 1.75), ("wrong", alpha)):
        head_alpha = torch.tensor([1.5, value, 1.0, 4 / 3])
        calls[name] = alpha_calls(head_alpha, "cpu")
    torch.save(calls["good"] + calls["wrong"], tmp_path / "calls.pt")
    run(environment, tmp_path, "-c", TRUST.format(BUILD / "trusting.so"))
    results = torch.load(tmp_path / "results.pt")
    for call, good, wrong in zip(
        calls["good"], results[: len(results) // 2], results[len(results) // 2 :], strict=True
    ):
        check_wrong_alpha(call, good, wrong)


@pytest.mark.parametrize("wrong", WRONG_IDS)
def test_a_page_that_is_not_there_makes_its_row_nan(environment, wrong, tmp_path):
    """Nobody has looked at page ids and selections: nothing outside is read, and other rows have what they had."""
    check_hostile_calls(environment, tmp_path, hostile_calls(None, "cpu"), hostile_calls(wrong, "cpu"))


def test_a_page_listed_before_others_makes_its_row_nan(environment, tmp_path):
    check_hostile_calls(environment, tmp_path, disordered_calls(False, "cpu"), disordered_calls(True, "cpu"))


def check_hostile_calls(environment: dict[str, str], folder: Path, good: list[tuple], bad: list[tuple]) -> None:
    torch.save(good + bad, folder / "calls.pt")
    run(environment, folder, "-c", TRUST.format(BUILD / "trusting.so"))
    results = torch.load(folder / "results.pt")
    for pair in zip(results[: len(good)], results[len(good) :], strict=True):
        check_hostile(*pair)
