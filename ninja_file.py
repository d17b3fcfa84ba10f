"""Writes a ninja file and runs it: setup.py builds the libraries so, and tests/emulation/build.py the emulated kernels.

An object is compiled again when its source, a file that it includes, its command or its compiler has changed.
"""

import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.utils import cpp_extension

CXX = shlex.split(os.environ.get("CXX", "c++"))
TORCH = [f"-I{path}" for path in cpp_extension.include_paths()] + ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10


class NinjaFile:
    """The rules and outputs of one folder. Outputs have names relative to it, sources have absolute paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.10"]
        self.programs: dict[str, list[Sequence[str]]] = {}  # the compilers of each rule
        self.logged: set[str] = set()

    def compiler(
        self,
        rule: str,
        program: Sequence[str],
        flags: Sequence[str],
        *,
        calls: Sequence[Sequence[str]] = (),
        keep_log: bool = False,
    ) -> None:
        """Adds a rule that compiles.

        Args:
            rule: its name.
            program: the compiler, perhaps behind others as in "ccache c++".
            flags: its flags.
            calls: other compilers that it calls.
            keep_log: whether x.o.log is to hold what the compiler said of x.o. Only warnings are shown then.
        """
        self.programs[rule] = [program, *calls]
        line = f"{_command([*program, *flags])} -MD -MF $out.d -c $in -o $out"
        if keep_log:
            self.logged.add(rule)
            line += " >$out.log 2>&1 || { cat $out.log; exit 1; }; grep -A 3 warning $out.log || true"
        self.lines += [
            f"rule {rule}",
            f"  command = {line}",
            "  description = $in",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def compile(self, rule: str, sources: Iterable[Path], into: str = "") -> list[str]:
        """Compiles each source into an object that is named after it; returns the objects."""
        objects = []
        for source in sources:
            objects.append(f"{into}{source.parent.name}/{source.name}.o")
            log = f" | {objects[-1]}.log" if rule in self.logged else ""
            self.lines.append(f"build {objects[-1]}{log}: {rule} {_path(source)} | {rule}.version")
        return objects

    def link(self, library: str, objects: Iterable[str], command: Sequence[str], flags: Sequence[str]) -> None:
        """A shared library, which takes its place when it is complete."""
        rule = f"link_{Path(library).name}"
        line = f"{_command(command)} -shared $in {_command(flags)} -o $out.new && mv $out.new $out"
        self.lines += [f"rule {rule}", f"  command = {line}", "  description = $out"]
        self.lines.append(f"build {library}: {rule} {' '.join(objects)}")

    def run(self) -> None:
        """Builds what is out of date; MAX_JOBS limits how many compilers run at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "ninja.lock").open("w") as lock:  # two builds may run at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._run()

    def _run(self) -> None:
        for rule, programs in self.programs.items():
            commands = [[*program, "--version"] for program in programs]
            said = [subprocess.run(command, check=True, capture_output=True, text=True) for command in commands]
            version = "".join(each.stdout for each in said)
            stamp = self.folder / f"{rule}.version"
            if not stamp.exists() or stamp.read_text() != version:
                stamp.write_text(version)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        # The ninja that is installed beside this Python need not be in PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["ninja", "-C", self.folder, *jobs], check=True, env=os.environ | {"PATH": path})


def _command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
