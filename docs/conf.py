"""How Sphinx builds these pages and the API reference: `make docs`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import entmaxkv  # noqa: E402

project = "entmaxkv"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = "entmaxkv"

default_role = "py:obj"  # `name` in a docstring: a link where the name is documented, else code
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes alone

# Examples run in the root of the repository, as those of the pages do.
doctest_global_setup = f"""
import os

os.chdir({str(ROOT)!r})

import torch

import entmaxkv
from entmaxkv import *
"""

CODE = re.compile(r"(``.*?``|`[^`]+`)")
MARKUP = re.compile(r"[*|\\]|_(?!\w)")  # emphasis, substitutions, and words that end like references
ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")  # of a section
CLASSES = [name for name in entmaxkv.__all__ if isinstance(getattr(entmaxkv, name), type)]


def to_markup(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text in Google's form; this makes markup of what that leaves open.

    |x|, [x]_+ and q * k stand for themselves outside of code and examples, an indented block behind a colon is code,
    a public class is a link in every module, and of several attributes or results each has an entry of its own.
    """
    example = block = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        block = block and (not line.strip() or line.startswith("    "))
        if what == "module" and line.endswith(":") and lines[i + 1 : i + 2] == [""] and lines[i + 2].startswith("    "):
            block = True
            lines[i] = line + ":"
        elif not example and not block:
            parts = CODE.split(line)
            parts[::2] = [MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
            parts[1::2] = [f":py:obj:`~entmaxkv.{p[1:-1]}`" if p[1:-1] in CLASSES else p for p in parts[1::2]]
            lines[i] = "".join(parts)
    for title, form in (("Attributes:", "    {}: {}"), ("Returns:", "    - **{}** \N{EN DASH} {}")):
        if title in lines:
            first = lines.index(title) + 1
            end = next((i for i in range(first, len(lines)) if not lines[i].startswith("    ")), len(lines))
            lines[first:end] = with_entries(lines[first:end], form, least=1 if title == "Attributes:" else 2)


def with_entries(section: list[str], form: str, *, least: int) -> list[str]:
    """The entries of a section in another form, one for each name, if it has at least so many."""
    starts = [i for i, line in enumerate(section) if ENTRY.fullmatch(line)]
    if len(starts) < least or starts[0] != 0:
        return section
    entries = []
    for start, end in zip(starts, [*starts[1:], len(section)], strict=True):
        names, text = ENTRY.fullmatch(section[start]).groups()
        for name in names.split(", "):
            entries.append(form.format(name, text))
            entries.extend(f"      {line.strip()}" for line in section[start + 1 : end])
    return entries


def is_alias(app, what, name, obj, skip, options) -> bool | None:
    """Leaves out what NamedTuple says of its fields: the docstring of the class says more."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app) -> None:
    app.connect("autodoc-process-docstring", to_markup, priority=400)  # before napoleon, which adds markup
    app.connect("autodoc-skip-member", is_alias)
