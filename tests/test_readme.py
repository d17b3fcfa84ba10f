"""README.md, docs and the examples' pages: every Python block runs, every path and link exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = "".join(path.read_text() for path in ROOT.glob("README.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall(README)
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [*sorted(ROOT.glob("README.md")), *DOCS, *sorted(ROOT.glob("examples/*/README.md"))]
SUFFIXES = r"py|cpp|h|cu|cuh|toml|txt|md|json|safetensors|yml|csv|png"


def id_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def programs(text: str) -> set[str]:
    """Files that the shell blocks of a page run."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"python ((?:bench|examples|tests)/[\w/-]+\.py)", "\n".join(blocks)))


def paths(text: str) -> set[str]:
    """Backticked words that name a file, or something below a directory of the repository."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    top = {path.name for path in ROOT.iterdir()}
    words = set(re.findall(r"`([^`\s]+)`", prose))
    return {
        word
        for word in words
        if re.fullmatch(rf"[\w./-]+\.({SUFFIXES})", word) or ("/" in word and word.split("/")[0] in top)
    }


def exists(path: str) -> bool:
    """Whether it is there from the root, or, a bare name, anywhere below it."""
    found = (ROOT / path).exists() or any(ROOT.glob(path))
    return found or ("/" not in path and any(ROOT.glob(f"*/**/{path}")))


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_has_a_quick_start():
    assert BLOCKS and len(BLOCKS[0].strip().splitlines()) <= 12


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_block_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(BLOCKS[block], f"README.md block {block}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [page for page in DOCS if BLOCK.search(page.read_text())], ids=id_of)
def test_blocks_of_a_page_run_one_after_the_other(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile("\n".join(BLOCK.findall(page.read_text())), page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_paths_of_a_page(page):
    text = page.read_text()
    assert not [path for path in sorted(paths(text) | programs(text)) if not exists(path)]


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_of_a_page(page):
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text())
    for path, _, anchor in (link.partition("#") for link in links):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_readme_leads_to_every_page():
    own = {page.name for page in DOCS} - {"index.md"}  # that of the built documentation
    linked = {name for page in PAGES for name in re.findall(r"\]\((?:docs/)?([\w-]+\.md)", page.read_text())}
    assert not own - linked


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    program = ROOT / "bench" / "report" / "pictures.py"
    subprocess.run([sys.executable, program, "--out", tmp_path], check=True, capture_output=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in ROOT.glob("docs/pictures/*.png")}
    assert all(f"(docs/pictures/{name})" in README for name in drawn)
    assert all(path.stat().st_size < 100_000 for path in tmp_path.iterdir())
