"""README.md and docs: every Python block runs, every path exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = "".join(path.read_text() for path in ROOT.glob("README.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall(README)
DOCS = sorted(ROOT.glob("docs/*.md"))
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
SUFFIXES = r"py|cpp|h|cu|cuh|toml|txt|md|json|safetensors|yml"


def paths() -> list[str]:
    """Backticked words that name a file, or something below a directory of the repository."""
    top = {path.name for path in ROOT.iterdir()}
    found = []
    for word in re.findall(r"`([^`\s]+)`", PROSE) + re.findall(r"\]\((?!http|#)([^)\s]+)\)", PROSE):
        if re.fullmatch(rf"[\w./-]+\.({SUFFIXES})", word) or ("/" in word and word.split("/")[0] in top):
            found.append(word)
    return sorted(set(found))


def test_has_a_quick_start():
    assert BLOCKS and len(BLOCKS[0].strip().splitlines()) <= 12


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_block_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(BLOCKS[block], f"README.md block {block}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", paths())
def test_path_exists(path):
    assert (ROOT / path).exists() or list(ROOT.glob(path)) or ("/" not in path and list(ROOT.glob(f"*/**/{path}")))


@pytest.mark.parametrize("page", [page for page in DOCS if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_blocks_of_a_page_run_one_after_the_other(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile("\n".join(BLOCK.findall(page.read_text())), page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_of_a_page(page):
    links = re.findall(r"\]\((?!http|#)([^)\s]+)\)", page.read_text())
    assert links and all((page.parent / link).exists() for link in links)
