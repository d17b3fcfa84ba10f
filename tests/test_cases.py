"""The case list that the tests of the ops share."""

import itertools

import pytest
import torch
from conftest import CASES, Case

VALUES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "alpha": [1.0, 1.25, 4 / 3, 1.5, 1.75, 2.0, None],
    "head_dim": [33, 64, 80, 96, 128, 256],
    "page_size": [8, 16, 32, 64, 128],
    "kv_heads": [1, 2, 3],
    "group": [1, 3, 4, 8],
    "transposed": [False, True],
    "alibi": [False, True],
    "scale": [None, 0.3, -0.2],
}


def test_every_column_is_covered():
    assert tuple(VALUES) == Case._fields


@pytest.mark.parametrize("columns", list(itertools.combinations(VALUES, 2)), ids="-".join)
def test_every_pair_of_values_occurs(columns):
    wanted = set(itertools.product(*(VALUES[column] for column in columns)))
    listed = {tuple(getattr(case, column) for column in columns) for case in CASES}
    assert listed == wanted, f"missing {wanted - listed}, unknown {listed - wanted}"
