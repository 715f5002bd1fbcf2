"""What `save` writes, `load` takes: whatever is wrapped around a model and wherever it was cut."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from decay_pruning import Pruner, SmoothPruning, Target, archive, load, save, surgery
from decay_pruning.errors import ManifestError
from decay_pruning.graph import Graph
from decay_pruning.hosts import GateDecorator

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # jit, dynamo

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cbr(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """A backbone, levels in a list, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(cbr(3, 8), cbr(8, 8))
        self.levels = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))])
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.levels[0](self.backbone(x)).mean((2, 3)))


def cut(model: nn.Module, *names: str) -> None:
    """Remove structure 1 of these layer groups."""
    structures = Graph(model, X).structures
    picks = {name: [int(structures.groups[name].ids[1])] for name in names}
    surgery.remove(model, structures, picks, example_inputs=X)


def comes_back(model: nn.Module, fresh: nn.Module, path: Path, x: torch.Tensor = X) -> None:
    save(model, path)
    assert load(fresh, path) is fresh
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    again = path.with_name("again")
    save(fresh, again)
    assert again.read_bytes() == path.read_bytes(), "and it can be saved again, byte for byte"


def pruned() -> Detector:
    model = Detector()
    cut(model, "backbone.0.0", "levels.0.0")
    return model


# -------------------------------------------------------------------------------------------- wrappers


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_looked_through(name: str, tmp_path: Path, one_process: None) -> None:
    model = pruned()
    save(model, tmp_path / "plain")
    save(WRAPPERS[name](model), tmp_path / "wrapped")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "wrapped").read_bytes()
    fresh = Detector(7)
    wrapper = WRAPPERS[name](fresh)
    assert load(wrapper, tmp_path / "plain") is wrapper
    assert torch.equal(model.eval()(X), fresh.eval()(X))


def test_wrappers_inside_a_model(tmp_path: Path) -> None:
    model = pruned()
    x = model.eval()(X)
    save(model, tmp_path / "plain")
    model.backbone = nn.DataParallel(model.backbone)  # type: ignore[assignment]
    model.levels[0] = torch.compile(model.levels[0])
    save(model, tmp_path / "wrapped")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "wrapped").read_bytes()
    fresh = Detector(7)
    fresh.backbone[1] = torch.compile(fresh.backbone[1])
    load(fresh, tmp_path / "wrapped")
    fresh.backbone[1] = fresh.backbone[1]._orig_mod
    assert torch.equal(fresh.eval()(X), x)


# ------------------------------------------------------------------------------------ parts and wholes


@pytest.mark.parametrize(
    "cuts",
    [
        [("backbone", "0.0")],
        [("", "backbone.0.0")],
        [("backbone", "0.0"), ("", "backbone.0.0"), ("backbone", "0.0")],
        [("", "backbone.0.0"), ("backbone", "0.0"), ("", "backbone.0.0", "levels.0.0")],
    ],
)
def test_parts_and_wholes_cut_in_any_order(cuts: list[tuple[str, ...]], tmp_path: Path) -> None:
    model = Detector()
    for part, *names in cuts:
        cut(model.get_submodule(part), *names)
    comes_back(model, Detector(7), tmp_path / "whole")
    comes_back(copy.deepcopy(model), Detector(7), tmp_path / "copy")
    comes_back(model.backbone, Detector(7).backbone, tmp_path / "part")
    comes_back(nn.Sequential(model, nn.Softmax(1)), nn.Sequential(Detector(7), nn.Softmax(1)), tmp_path / "m")


def test_a_new_head_on_a_pruned_backbone(tmp_path: Path) -> None:
    model, fresh = Detector(), Detector(7)
    cut(model, "levels.0.0")
    torch.manual_seed(1)
    model.levels[0][2] = nn.Conv2d(model.levels[0][0].out_channels, 4, 1)
    comes_back(model, fresh, tmp_path / "model")


def test_after_batch_norms_were_fused(tmp_path: Path) -> None:
    def fused(model: Detector) -> Detector:
        model.eval()
        for block in model.backbone:
            block[0], block[1] = fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
        return model

    comes_back(fused(pruned()), fused(Detector(7)), tmp_path / "model")
    with pytest.raises(ManifestError, match=r"the model has no 'backbone\.0\.0\.bias'"):
        load(Detector(), tmp_path / "model")


# ------------------------------------------------------------------------------------ what is refused


def refused(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=words):
        save(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_shapes_that_no_history_explains(tmp_path: Path) -> None:
    by_hand = Detector()
    by_hand.head.weight = nn.Parameter(by_hand.head.weight[:, :3].clone())
    refused(by_hand, r"'head' was narrowed without a note of what was kept \(weight is \[3, 3\]", tmp_path)

    smaller = pruned()
    smaller.backbone[0][0].weight.data = smaller.backbone[0][0].weight.data[:4]
    smaller.backbone[0][0].out_channels = 4
    refused(smaller, r"'backbone\.0\.0\.\w+' was cut to 7 and is now 4", tmp_path)

    masked = pruned()
    nn.utils.parametrizations.weight_norm(masked.levels[0][0])
    refused(masked, r"'levels\.0\.0\.weight' was cut and is now computed", tmp_path)


def test_a_model_built_narrow_is_told_apart_from_a_pruned_one(tmp_path: Path) -> None:
    model, narrow = pruned(), Detector()
    narrow.backbone[0] = cbr(3, 7)
    narrow.backbone[1][0] = nn.Conv2d(7, 8, 3, bias=False)
    narrow.levels[0] = copy.deepcopy(model.levels[0])
    for layer in (narrow.levels[0][0], narrow.levels[0][2]):
        del layer.__dict__[surgery._HISTORY]
    narrow.load_state_dict(model.state_dict())
    save(narrow, tmp_path / "narrow")
    with pytest.raises(ManifestError, match="the file knows of no removal"):
        load(Detector(7), tmp_path / "narrow")


def test_a_host_at_work_is_refused_and_a_finished_one_is_not(tmp_path: Path) -> None:
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    smooth = SmoothPruning(steps=2)
    pruner = Pruner(
        model, X, optimizer, Target(macs=0.9), host=GateDecorator(), smooth=smooth, total_steps=60
    )
    refused(model, r"'backbone\.0\.1' is in the form .* call pruner\.finish\(\) first", tmp_path)
    for _ in range(6):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    pruner.finish(force=True)
    comes_back(model, Detector(7), tmp_path / "model")


def test_tensors_that_a_file_cannot_hold(tmp_path: Path) -> None:
    refused(nn.LazyLinear(3), "is not initialised yet", tmp_path)
    refused(nn.Linear(2, 2, device="meta"), "is a meta tensor", tmp_path)
    sparse = nn.Module()
    sparse.register_buffer("mask", torch.eye(3).to_sparse())
    refused(sparse, "'mask' is a sparse_coo tensor", tmp_path)
    refused(torch.jit.trace(pruned().eval(), X), "scripted", tmp_path)


# ---------------------------------------------------------------------- what else a state can consist of


class Odd(nn.Module):
    """A version of its own, values beside tensors, tied and shared tensors, buffers that are not saved."""

    _version = 3
    scale: torch.Tensor

    def __init__(self, seed: int = 0, calls: Any = 0, refuses: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(4, 6)
        self.b = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(6, 6)])})
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.a.weight
        self.register_buffer("scale", torch.ones(6), persistent=False)
        self.register_buffer("view", self.a.bias.detach()[:2])
        self.calls, self.refuses = calls, refuses

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]
        if self.refuses:
            self.refuses = False
            raise RuntimeError("not today")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 3:
            raise ValueError(f"version should be 3 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b["list"][0](self.a(x) * self.scale)


def narrow(model: nn.Module, below: str = "") -> None:
    keep = torch.tensor([0, 2, 3, 5])
    names = ("a.weight", "a.bias", "a.out_features", "tied.out_features", "scale")
    kept = {(below + name, 0): keep for name in names}
    surgery.shrink(
        model, {**kept, (f"{below}b.list.0.weight", 1): keep, (f"{below}b.list.0.in_features", 0): keep}
    )


@pytest.mark.parametrize("calls", [3, {"a": [1.5, None, "x"]}])
def test_versions_extra_state_ties_views_and_buffers_that_are_not_saved(calls: Any, tmp_path: Path) -> None:
    model, fresh = Odd(calls=calls), Odd(7)
    narrow(model)
    x = torch.randn(3, 4)
    comes_back(model, fresh, tmp_path / "odd", x)
    assert fresh.calls == calls and fresh.tied.weight is fresh.a.weight
    assert fresh.scale.shape == (4,)
    comes_back(model.tied, Odd(8).tied, tmp_path / "tied", x)


def test_a_model_that_refuses_halfway_is_as_it_was(tmp_path: Path) -> None:
    model, fresh = Odd(calls=3), Odd(7, calls=1, refuses=True)
    save(model, tmp_path / "odd")
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ManifestError, match="not today"):
        load(fresh, tmp_path / "odd")
    assert fresh.calls == 1
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items() if k != "_extra_state")


def test_two_tensors_do_not_become_one(tmp_path: Path) -> None:
    untied = Odd()
    untied.tied.weight = nn.Parameter(torch.zeros(6, 4))
    save(untied, tmp_path / "odd")
    with pytest.raises(ManifestError, match=r"'a\.weight' and 'tied\.weight' are one tensor in it, and two"):
        load(Odd(7), tmp_path / "odd")


# ---------------------------------------------------------------------------------------------- the file


def untouched(path: Path) -> None:
    """Loading raises, and the model is as it was."""
    model = Detector(7)
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ManifestError) as error:
        load(model, path)
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)
    assert repr(model) == text and not surgery.history(model).positions
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    files = set()
    for _ in range(8):
        save(pruned(), tmp_path / "model")
        files.add((tmp_path / "model").read_bytes())
    assert len(files) == 1


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    save(pruned(), tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    at = torch.randint(0, 8 * len(data), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for bit in [
        *range(0, 64, 9),
        8 * (header - 1),
        8 * header,
        8 * len(data) - 1,
        *range(64, 8 * header, 1999),
        *at,
    ]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "model").write_bytes(damaged)
        untouched(tmp_path / "model")


def first_version(model: nn.Module, path: Path) -> None:
    """A file as the first version wrote it."""
    save(model, path)
    meta, tensors = archive.read(path)
    parts = {name: meta[name] for name in ("class", "tensors", "aliases", "kept")}
    header = {"format": "decay-pruning", "version": "1", "manifest": json.dumps(parts)}
    save_file(tensors, path, header)


def test_a_file_of_the_first_version_still_loads(tmp_path: Path) -> None:
    model, fresh = pruned(), Detector(7)
    first_version(model, tmp_path / "old")
    load(fresh, tmp_path / "old")
    assert torch.equal(model.eval()(X), fresh.eval()(X))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None] = lambda meta: None, **parts: str) -> None:
    """Change a description, or put these texts in place of some of its values, and sign the file anew."""
    meta, tensors = archive.read(path)
    change(meta)
    meta |= {name: f"<{name}>" for name in parts}
    text = json.dumps({**meta, "checksum": "0" * 64}, separators=(",", ":"), sort_keys=True)
    for name, value in parts.items():
        text = text.replace(f'"<{name}>"', value)
    save_file(tensors, path, {archive.KEY: text})
    archive.sign(path)


def test_only_widths_that_a_removal_cuts_are_set(tmp_path: Path) -> None:
    """Every number and every tuple of numbers on every module, cut by one."""
    model = Detector()
    places = []
    for path, module in model.named_modules():
        for leaf, value in vars(module).items():
            sizes = value if isinstance(value, tuple) else (value,)
            if path and all(isinstance(n, int) for n in sizes):
                places += [(f"{path}.{leaf}", dim, int(n)) for dim, n in enumerate(sizes)]
    assert {"stride", "kernel_size", "padding", "groups", "training"} <= {p[0].split(".")[-1] for p in places}
    for name, dim, size in places:
        save(model, tmp_path / "model")
        row = {"tensor": name, "dim": dim, "original": size, "kept": [*range(max(1, size - 1))]}
        rewrite(tmp_path / "model", lambda meta, row=row: meta["kept"].append(row))
        if len(row["kept"]) < size or not name.endswith(("channels", "groups", "features")):
            untouched(tmp_path / "model")


def test_tensors_are_cut_along_widths_only(tmp_path: Path) -> None:
    def cut_kernel(meta: dict[str, Any]) -> None:
        name = "backbone.0.0.weight"
        meta["tensors"][name]["original"] = [8, 3, 3, 4]
        meta["kept"].append({"tensor": name, "dim": 3, "original": 4, "kept": [0, 1, 2]})

    save(Detector(), tmp_path / "model")
    rewrite(tmp_path / "model", cut_kernel)
    model = Detector(7)
    model.backbone[0][0] = nn.Conv2d(3, 8, (3, 4), bias=False)
    with pytest.raises(ManifestError, match=r"in the layer 'backbone\.0\.0', weight is \[8, 3, 3, 3\]"):
        load(model, tmp_path / "model")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "parts",
    [
        *({"kept": DEEP}, {"tensors": DEEP}, {"class": DEEP}, {"extra": DEEP}),
        *({"kept": "3"}, {"kept": "{}", "tensors": "[]"}, {"aliases": "null"}, {"tensors": '{"a":[]}'}),
        *({"aliases": '{"a":[1]}'}, {"versions": "[1]"}, {"versions": '{"":1e400}'}, {"extra": "7"}),
        *(
            {"kept": f'[{{"tensor":"backbone.0.0.weight","dim":{dim},"original":{size},"kept":[{at}]}}]'}
            for dim, size, at in [
                *(
                    ("0", "8", at)
                    for at in ("9223372036854775808", "1e400", "NaN", "-1", "true", '"0"', "[0]", "0.0")
                ),
                *(("0", size, "0") for size in ("9223372036854775808", "-1e400", "null", "9" * 5000)),
                *((dim, "8", "0") for dim in ("9223372036854775808", "-1", "1.5", "null", "false")),
            ]
        ),
        {"kept": '[{"tensor":"","dim":0,"original":8,"kept":[0]}]'},
        {"kept": '[{"tensor":"head.__class__","dim":0,"original":8,"kept":[0]}]'},
        {"kept": '[{"tensor":["head"],"dim":0,"original":8,"kept":[0]}]'},
    ],
    ids=lambda parts: json.dumps(parts)[:60],
)
def test_hostile_descriptions(parts: dict[str, str], tmp_path: Path) -> None:
    save(Detector(), tmp_path / "model")
    rewrite(tmp_path / "model", **parts)
    untouched(tmp_path / "model")


FULL = """
import resource, sys
from tests.test_files_models import pruned
from decay_pruning import ManifestError, save
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    save(pruned(), sys.argv[1])
except ManifestError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_file_size_limit_ends_in_one_sentence_and_keeps_the_old_file(tmp_path: Path) -> None:
    save(pruned(), tmp_path / "model")
    before = (tmp_path / "model").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path / 'model'}: ") and done.stdout.count("\n") == 1
    assert (tmp_path / "model").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
