"""What the README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_own_loop(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "own_loop.py")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MACs" in done.stdout and "pruned:" in done.stdout
    assert (tmp_path / "digits-pruned.safetensors").stat().st_size > 0


@pytest.mark.parametrize("name", ["two_optimizers", "mixed_precision", "closure", "cut_at_the_end", "resume"])
def test_loops(tmp_path, name):
    """Each ends with at most half of the MACs, and far above chance."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    macs = re.search(r"MACs +([\d,]+) -> ([\d,]+)", done.stdout)
    assert macs, done.stdout
    before, after = (int(figure.replace(",", "")) for figure in macs.groups())
    assert after <= 0.5 * before
    reached = [float(figure) for figure in re.findall(r"([\d.]+) %(?:$|,)", done.stdout.splitlines()[-1])]
    assert reached and min(reached) > 80, done.stdout


def anchors(page: Path) -> set[str]:
    """What its headings can be linked as: small letters, no punctuation, hyphens for spaces."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_and_file_that_the_docs_name_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            link = part.partition(")")[0]
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"
