"""The text that the shipped model was trained on: the Python standard library's own source."""

import hashlib
import sysconfig
from pathlib import Path

SEPARATOR = b"\x00"


def default_source() -> Path:
    """The standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def files(source: Path) -> dict[str, Path]:
    """All Python files under source by their relative path, without installed packages."""
    paths = {path.relative_to(source).as_posix(): path for path in source.rglob("*.py") if path.is_file()}
    return {name: paths[name] for name in sorted(paths) if "-packages/" not in name}


def held_out(name: str) -> bool:
    """Whether the file of this relative path is kept out of training: one in 32, the same in every Python."""
    return hashlib.sha256(name.encode()).digest()[2] < 8
