"""The text that the example models are trained on: Python's standard library and the installed packages."""

import hashlib
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

SEPARATOR = b"\x00"
# Held-out files in these folders have near relatives among the training files.
RELATED = ("encodings/", "test/")
# Files of installed packages that are text. Larger files than MOST_BYTES are mostly generated tables.
SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".cmake", ".rst", ".md", ".txt"}
MOST_BYTES = 500_000
# A file is a near copy of another if it holds this fraction of the other's long lines, and at least COPIED_LINES.
LONG_LINE, COPIED_SHARE, COPIED_LINES = 40, 0.2, 5


def default_source() -> Path:
    """The standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def default_packages() -> Path:
    """The packages installed for the running Python."""
    return Path(sysconfig.get_path("purelib"))


def files(source: Path) -> dict[str, Path]:
    """All Python files under source by their relative path, without installed packages."""
    paths = {path.relative_to(source).as_posix(): path for path in source.rglob("*.py") if path.is_file()}
    return {name: paths[name] for name in sorted(paths) if "-packages/" not in name}


def held_out(name: str) -> bool:
    """Whether the file of this relative path is kept out of training: one in 32, the same in every Python."""
    return hashlib.sha256(name.encode()).digest()[2] < 8


def package_texts(packages: Path) -> list[bytes]:
    """The source and documentation files under packages, each once, in the order of their paths."""
    found: dict[bytes, bytes] = {}
    for path in sorted(packages.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and 0 < path.stat().st_size <= MOST_BYTES:
            text = path.read_bytes()
            if SEPARATOR not in text:
                found.setdefault(hashlib.sha256(text).digest(), text)
    return list(found.values())


def long_lines(text: bytes) -> set[bytes]:
    """The lines of at least LONG_LINE bytes, without the white space around them."""
    return {line for line in map(bytes.strip, text.split(b"\n")) if len(line) >= LONG_LINE}


def without_copies(texts: Iterable[bytes], originals: Iterable[bytes]) -> list[bytes]:
    """The texts without the near copies of an original, such as a package's own copy of a held-out module."""
    owners = defaultdict(list)
    least = {}
    for i, original in enumerate(originals):
        lines = long_lines(original)
        least[i] = max(COPIED_LINES, COPIED_SHARE * len(lines))
        for line in lines:
            owners[line].append(i)
    kept = []
    for text in texts:
        copied = Counter(i for line in long_lines(text) for i in owners.get(line, ()))
        if not any(count >= least[i] for i, count in copied.items()):
            kept.append(text)
    return kept
