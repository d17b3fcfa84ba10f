"""Runs bench/reference.py, which times the authors' code, on given inputs, and reads back its results.

The authors' package has the name of ours, so bench/reference.py runs in a process of its own that finds theirs first.
Inputs and results go through files in a temporary folder. Every case starts a new process, so that the search of the
authors' kernels for launch settings is made for that case.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

PROGRAM = Path(__file__).with_name("reference.py")


class Result(NamedTuple):
    """One method of the authors.

    Attributes:
        dtype, us, timed, tokens: As in the rows of bench/decode.py.
        out: [batch, heads, head_dim].
    """

    dtype: str
    us: float
    timed: str
    tokens: float
    out: Tensor


def authors(
    path: Path, inputs: dict[str, Tensor], *, page_size: int, budgets: list[int], alpha: float, repeats: int
) -> tuple[dict[str, Result], dict[str, str]]:
    """Times the methods of the authors' checkout at `path` on the tensors q, k and v.

    Returns:
        The results, and for each method that failed the reason, both by the name of the method.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({name: x.contiguous() for name, x in inputs.items()}, folder / "inputs")
        order = {"page_size": page_size, "budgets": budgets, "alpha": alpha, "repeats": repeats}
        (folder / "order").write_text(json.dumps(order))
        paths = [str(path.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        ran = subprocess.run([sys.executable, PROGRAM, folder], env=environment, capture_output=True, text=True)
        if ran.returncode:
            last = (ran.stderr.strip() or f"ended with code {ran.returncode}").splitlines()[-1]
            return {}, {"the authors' entmaxkv": last}
        answer = json.loads((folder / "answer").read_text())
        outs = load_file(folder / "outs", device=str(inputs["q"].device))
        return {name: Result(**row, out=outs[name]) for name, row in answer["rows"].items()}, answer["failures"]
