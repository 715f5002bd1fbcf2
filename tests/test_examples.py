"""What the README shows runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_own_loop(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "own_loop.py")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MACs" in done.stdout and "pruned:" in done.stdout
    assert (tmp_path / "digits-pruned.safetensors").stat().st_size > 0


def test_every_link_and_file_that_the_docs_name_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target = part.partition(")")[0]
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
