"""Checks of the arguments of the Python API. The ops check their own arguments in csrc/check.h."""

import operator
from numbers import Real
from typing import Any

from torch import Tensor


def is_number(value: object) -> bool:
    # float and int are Real, too. Named first they are found without asking Real, which is slow: every step comes here.
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether it is a whole number that an op can take for a count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def whole(value: Any) -> int:
    """Turns a whole number of any type, such as NumPy's, into an int; raises TypeError for anything else."""
    if isinstance(value, bool):
        raise TypeError("expected a whole number, got a bool")
    return operator.index(value)


def tensor(name: str, value: object, dims: str) -> None:
    """Refuses what is no tensor with as many dimensions as `dims` names, such as "[batch, q_heads, head_dim]"."""
    if not isinstance(value, Tensor) or value.dim() != dims.count(",") + 1:
        raise ValueError(f"{name}: expected a tensor {dims}, got {described(value)}")


def described(value: object) -> str:
    """Describes an argument in a few words, for the end of a message."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"
