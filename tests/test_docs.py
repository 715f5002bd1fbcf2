"""The documentation: its pages run, are found, and leave out nothing that is public. No mkdocs is needed here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import decay_pruning
from decay_pruning import hosts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.sub(r"^\s*#.*$", "", text[text.index("\nnav:") :], flags=re.MULTILINE)
    entries = re.findall(r"[\w/-]+\.md", nav)
    assert sorted(entries) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))
    public = {f"decay_pruning.{name}" for name in decay_pruning.__all__}
    of_hosts = {f"decay_pruning.hosts.{name}" for name in set(hosts.__all__) - set(decay_pruning.__all__)}
    assert not (public | of_hosts) - shown


def test_every_public_name_says_what_it_is() -> None:
    silent = []
    for name in decay_pruning.__all__:
        thing = getattr(decay_pruning, name)
        if not isinstance(thing, type) and not callable(thing):
            continue  # a module, or an alias with a comment
        mine = {name: thing}
        for method, value in vars(thing).items() if isinstance(thing, type) else ():
            if not method.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                mine[f"{name}.{method}"] = value
        silent += [each for each, value in mine.items() if not (value.__doc__ or "").strip()]
    assert not silent


@pytest.mark.parametrize(
    "page", [*sorted((DOCS / "tasks").glob("*.md")), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)  # what torchrun sets
    code = "\n".join(blocks)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def texts_of(source: Path) -> set[str]:
    """Every text in a module, with … for what is filled in, and words of the constants that it joins."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    return {text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant)}


def test_every_message_on_the_page_is_one_that_the_library_says() -> None:
    said: set[str] = set()
    for source in (ROOT / "src").rglob("*.py"):
        said |= texts_of(source)
    logged = {re.sub(r"%[rsd]", "…", text) for text in said}
    page = (DOCS / "messages.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert len(quoted) > 40
    for message in quoted:
        pattern = re.compile(".*?".join(map(re.escape, message.split("…"))), re.DOTALL)
        assert any(map(pattern.match, logged)), message
