"""Ctrl-C ends a comparison within seconds, whatever its processes are doing, and what is finished stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decay_pruning.lab import results

from .test_parallel import alive, wait_until

LONG = """
device = "cpu"
data = { train_limit = 512, test_limit = 60 }
dense = { epochs = 1, batch_size = 64 }
[prune]
epochs = 100000
batch_size = 64
lr = 0.05
target = { macs = 0.6 }
[report]
eval_every = 100000
latency_batch = 2
"""


def children(process: int) -> list[int]:
    """All processes below this one."""
    found = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    rows = [tuple(map(int, line.split())) for line in found.splitlines()]
    below = [process]
    for parent in below:
        below += [pid for pid, of in rows if of == parent]
    return below[1:]


@pytest.mark.skipif(os.name != "posix", reason="signals of a terminal")
@pytest.mark.parametrize("whole_group", [True, False], ids=["from the keyboard", "to the command only"])
def test_ctrl_c_in_the_middle_of_a_long_training(tmp_path: Path, whole_group: bool) -> None:
    (tmp_path / "long.toml").write_text(LONG)
    command = [sys.executable, "-m", "decay_pruning.cli", "compare", "long.toml", "--arms", "sp,sr"]
    process = subprocess.Popen(
        [*command, "--seeds", "1", "--jobs", "2", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any((tmp_path / "out" / "starts").glob("seed0-*")), 120)
        time.sleep(3)  # both arms train
        below = children(process.pid)
        assert len(below) >= 2
        begun = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - begun < 15
        assert process.returncode == 130
        assert said.strip() == "stopped; finished runs are kept, the same command goes on from there"
        wait_until(lambda: not any(map(alive, below)), 5)
    finally:
        process.kill()
    assert not list((tmp_path / "out").rglob(".*"))


def test_runs_that_are_finished_are_kept(tmp_path: Path) -> None:
    (tmp_path / "long.toml").write_text(LONG.replace("epochs = 100000\nbatch", "epochs = 1\nbatch"))
    command = [sys.executable, "-m", "decay_pruning.cli", "compare", "long.toml", "--arms", "single,sp,sr"]
    process = subprocess.Popen(
        [*command, "--seeds", "20", "--jobs", "2", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    file = tmp_path / "out" / results.FILE
    try:
        wait_until(file.is_file, 120)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and 1 <= len(results.load(file).runs) < 60
