"""Packages that entmaxkv does without, imported at their first use: what a program can do is told without them."""

import importlib
import sys
from typing import Any


class Package:
    """Stands for a package, and ends the program with what to install where the package is needed and not there.

    Args:
        name: as in `import name`.
        extra: the extra of entmaxkv that installs it.
    """

    def __init__(self, name: str, extra: str):
        self._name, self._extra = name, extra

    def __getattr__(self, attribute: str) -> Any:
        try:
            module = importlib.import_module(self._name)
            if not hasattr(module, attribute):
                importlib.import_module(f"{self._name}.{attribute}")
        except ImportError as error:
            raise SystemExit(
                f"{sys.argv[0]}: expected {self._name}, got {type(error).__name__}: {error}; "
                f"`pip install --no-build-isolation --editable '.[{self._extra}]'` installs it"
            ) from error
        return getattr(module, attribute)
