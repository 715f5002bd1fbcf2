"""Hooks of the documentation site: links to files of the repository work in it, too.

A page links to a file as the repository has it (`../results/digits.json`), so the link works where the repository is
browsed. For the site each file that some page links to comes along: text as a page with its code, the rest as it is.
"""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path
from textwrap import indent
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+)([\w./-]+)(#[\w-]+)?\)")
ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="((?:https?:)?//[^"]*)"')
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".txt": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to."""
    queue = [file for file in files if file.src_uri.endswith(".md")]
    for file in queue:
        for target in _outside(file.content_string, file.src_uri):
            added = _added(target, config)
            if added and files.get_file_from_path(added.src_uri) is None:
                files.append(added)
                queue += [added] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Sends links that leave the docs folder to what `on_files` added."""
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        target = _target(here, found)
        if target is None:
            return found[0]
        up = "../" * here.count("/")
        return f"]({up}{_place(target)}{found[3] or ''})"

    return LINK.sub(moved, markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Nothing is loaded from elsewhere."""
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[1]} from elsewhere")
    return output


def _outside(markdown: str, here: str) -> list[Path]:
    """Files of the repository, outside docs/, that a page links to."""
    return [target for found in LINK.finditer(markdown) if (target := _target(here, found))]


def _target(here: str, found: re.Match[str]) -> Path | None:
    folder = ROOT / (here.removeprefix("files/") if here.startswith("files/") else f"docs/{here}")
    target = (folder.parent / found[1] / found[2]).resolve()
    inside = target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs")
    return target if inside and target.is_file() else None


def _place(target: Path) -> str:
    """Where it lies in the site's sources."""
    name = target.relative_to(ROOT)
    page = target.suffix in {*LANGUAGES, ".ipynb"}
    return f"files/{name}.md" if page else f"files/{name}"


def _added(target: Path, config: MkDocsConfig) -> File:
    place, name = _place(target), target.relative_to(ROOT)
    if place == f"files/{name}":
        return File.generated(config, place, abs_src_path=str(target))
    text = target.read_text(encoding="utf-8")
    body = (
        _notebook(text) if name.suffix == ".ipynb" else f"# {name}\n\n{_code(text, LANGUAGES[name.suffix])}"
    )
    return File.generated(config, place, content=f"---\nsearch:\n  exclude: true\n---\n{body}")


def _code(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````\n"


def _notebook(text: str) -> str:
    """Cells, one after the other."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(_code(source, "python") if kind == "code" else source for kind, source in cells)


class Docstrings(griffe.Extension):
    """What stands in the code beside docstrings: doctests without a heading, and `#:` comments of attributes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Doctests are shown as code, whatever stands before them."""
        if obj.docstring is not None:
            text = DOCTEST.sub(lambda found: f"Examples:\n{indent(found[0], '    ')}", obj.docstring.value)
            obj.docstring.value = text.replace("  # doctest: +SKIP", "")

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """A comment above an attribute, or behind it, is its docstring."""
        if attr.docstring is None and attr.lineno is not None and isinstance(attr.filepath, Path):
            lines = attr.filepath.read_text(encoding="utf-8").splitlines()
            above = takewhile(lambda line: line.lstrip().startswith("#:"), reversed(lines[: attr.lineno - 1]))
            own = lines[attr.lineno - 1 : attr.endlineno]
            said = [
                line.partition("#:")[2].strip() for line in [*reversed(list(above)), *own] if "#:" in line
            ]
            if said:
                attr.docstring = griffe.Docstring("\n".join(said), parent=attr)
