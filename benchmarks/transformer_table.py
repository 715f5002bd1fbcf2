"""What of each transformer can be pruned exactly, in which kinds of structures: docs/transformers.md.

    python benchmarks/transformer_table.py --out results/transformers.json     # one process and one time limit a model
    python benchmarks/transformer_table.py --page results/transformers.json    # docs/transformers.md, from the file

(The name `transformers` is taken: that file would be imported in place of the package.) Small random-weight models of
`stock`, default settings. Of each model: the layer groups by kind, how far outputs are from those of the full model
with the same structures at zero when every second structure of every layer group goes (in double precision; norms of
transformers compute in single precision all the same), the share of MACs that is left when a target of 25 % is pruned
in one step, and whether `generate()` then gives the same tokens with its cache and without.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import stock
import torch
from torch import Tensor, nn

from decay_pruning import DepGraph, Pruner, SmoothPruning, Target, proof, surgery
from decay_pruning.budget import CostModel
from decay_pruning.counting import count
from decay_pruning.errors import BudgetError
from decay_pruning.graph import Graph
from decay_pruning.lab import results as lab
from decay_pruning.structures import LayerGroup, Role, StructureSet

KINDS = ("heads", "KV groups", "FFN", "residual width", "experts", "other")
#: Models, and the outputs that have to keep their shape where a hidden state is returned beside them.
MODELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("hf:bert", "hf:distilbert", "hf:gpt2", "hf:gptneox", "hf:opt"), ()),
    **dict.fromkeys(("hf:llama", "hf:qwen2", "hf:qwen3", "hf:mistral", "hf:mixtral"), ()),
    **dict.fromkeys(("hf:gemma2", "hf:gemma3", "hf:phi3"), ()),
    "hf:t5": ("logits",),
    "hf:whisper": ("logits",),
    "hf:clip": ("logits_per_image", "logits_per_text"),
    **dict.fromkeys(("hf:vit", "hf:dinov2", "hf:swin", "hf:segformer", "hf:wav2vec2", "hf:mamba"), ()),
    **dict.fromkeys(("timm:vit_tiny_patch16_224", "timm:deit_tiny_distilled_patch16_224"), ()),
    **dict.fromkeys(("timm:eva02_tiny_patch14_224", "timm:swin_tiny_patch4_window7_224"), ()),
    **dict.fromkeys(("timm:mixer_s32_224", "torchvision:vit_b_16", "torchvision:swin_t"), ()),
}
TARGET = 0.25
_ATTENTION = r"attn|attention|query|key|value|qkv|q_proj|k_proj|v_proj|k_lin|q_lin|v_lin|\.[qkv]$|c_attn"
_FFN = (
    r"mixer\.conv1d|mlp|ffn|\.fc[12]|\.lin[12]$|intermediate|dense|\.w[io]$|gate_proj|up_proj|c_fc"
    r"|feed_forward|linear1"
)
_STEM = r"embed|patch|wte|wpe|shared$|token|class_token|conv_proj|projection$|features\.0"
_OUT = r"out_proj|o_proj|proj$|c_proj|fc2|output\.dense|down|\.o$|\.wo$|dense_4h_to_h|out_lin|lin2|reduction|\.3$"


def kind_of_group(group: LayerGroup) -> str:
    """Heads, KV groups, …: told by the names of the layers and by how many positions a structure has."""
    rows = [c for c in group.couplings if c.role is Role.ROW and ".lora" not in c.tensor]
    columns = {c.tensor for c in group.couplings if c.role is Role.COLUMN}
    names = [c.tensor.rpartition(".")[0] for c in rows]
    if any("expert" in c.tensor for c in rows) and len(columns) < 4:
        return "experts"
    if any(re.search(_STEM, name) for name in names) or len(columns) > 3:
        return "residual width"
    if any(re.search(_ATTENTION, name) for name in names):
        wide = {c.tensor: c.position.numel() for c in rows if "bias" not in c.tensor}
        return "KV groups" if len(set(wide.values())) > 1 else "heads"
    return "FFN" if any(re.search(_FFN, name) for name in names) else "other"


def kind_of_layer(name: str) -> str:
    """The same of a layer that is no layer group."""
    if re.search(_STEM, name) or (re.search(_OUT, name) and not re.search(r"qkv|in_proj", name)):
        return "residual width"
    if "expert" in name or name.endswith("mlp.gate"):
        return "experts"
    if re.search(_ATTENTION, name):
        return "heads"
    return "FFN" if re.search(_FFN, name) else "other"


def look(name: str) -> dict[str, Any]:
    """What the library makes of one model."""
    torch.set_num_threads(1)
    model, x = stock.build(name)
    if name != "hf:mixtral":  # the product of all experts knows no double precision
        model = model.double()
    with torch.no_grad():  # branches and heads that start at zero would hide what happens
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    kind = next(model.parameters()).dtype
    x = proof.mapped(x, lambda t: t.to(kind) if t.is_floating_point() else t)
    fresh, half_gone = copy.deepcopy(model), copy.deepcopy(model)
    pruner, found = _pruner(model, x, MODELS[name])
    structures = pruner.original
    found["kinds"] = _kinds(structures)
    found["kept by"] = _kept_by(fresh, x, structures) if found["least"] > TARGET else []
    found["unprunable"] = dict(structures.unprunable)
    half = {key: group.ids[1::2].tolist() for key, group in structures.groups.items()}
    found["difference"] = _difference(half_gone, x, structures, half)
    report = pruner.finish(force=True)
    found["left"] = report.macs[1] / report.macs[0]
    found["generates"] = _generates(model, x)
    return found


class _Once:
    """A host that looks for structures once, however often it is asked."""

    def __init__(self, host: DepGraph) -> None:
        self.host, self.rounds, self.interval = host, host.rounds, host.interval
        self.begin = host.begin
        self._graph: Graph | None = None

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        self._graph = self._graph or self.host.graph(model, example_inputs)
        return self._graph


def _pruner(model: nn.Module, x: Any, outputs: tuple[str, ...]) -> tuple[Pruner, dict[str, Any]]:
    """A pruner for 25 % of the MACs, or for as much as can be."""
    host, one = _Once(DepGraph(outputs=outputs)), SmoothPruning.one_step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    graph = host.graph(model, x)
    costs = CostModel(model, x, graph.structures)
    gone = {key: torch.arange(len(group)) > 0 for key, group in graph.structures.groups.items()}
    least = costs.after(gone).macs / costs.now.macs
    target = TARGET
    while True:
        try:
            return Pruner(model, x, optimizer, Target(macs=target), host=host, smooth=one), {"least": least}
        except BudgetError:
            target = max(target, least) + 0.01


def _difference(model: nn.Module, x: Any, structures: StructureSet, picks: dict[str, list[int]]) -> float:
    """The largest change of an element by a removal, relative to the largest one of its tensor."""
    surgery.zero_(model, structures, picks)
    shown = structures.outputs.kept(structures.gone(picks))
    before = surgery.observe(model, x).narrowed(shown)
    surgery.remove(model, structures, picks, example_inputs=x)
    pairs = zip(before.leaves, surgery.observe(model, x).leaves, strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if a.is_floating_point())


def _kinds(structures: StructureSet) -> dict[str, list[int]]:
    """Kind → numbers of structures in each layer group."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for group in structures.groups.values():
        found[kind_of_group(group)].append(len(group))
    return found


def _reasons(unprunable: dict[str, str]) -> dict[str, list[str]]:
    """Kind → reasons of what is no layer group, each once."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for layer, why in unprunable.items():
        kind, short = kind_of_layer(layer), _short(why)
        said = why.startswith(("shares its width", "feeds", "has a single", "is not reached"))
        if not said and short not in found[kind]:
            found[kind].append(short)
    if not found["residual width"] and any(why.startswith("feeds") for why in unprunable.values()):
        found["residual width"].append("feeds the model's output")
    return {kind: some[:2] for kind, some in found.items()}


def _short(why: str) -> str:
    """Without the numbers of layers and of sizes, so that blocks of one kind say the same."""
    why = re.sub(r"(?<=\.)\d+(?=\.)", "…", why.split("; nor with")[0])
    return re.sub(r"; its width is split by .*", "", why).replace(
        " (allow_inexact=True prunes it all the same)", ""
    )


def _kept_by(model: nn.Module, x: Any, structures: StructureSet) -> list[str]:
    """The reasons behind most of the MACs that stay, the largest first."""
    gone = {key: group.ids[1:].tolist() for key, group in structures.groups.items()}
    left = {place: keep.numel() / structures.sizes[place] for place, keep in structures.kept(gone).items()}
    shares: dict[str, float] = {}
    products = count(model, x)
    for product in products:
        share = float(product.macs)
        for place in set(product.makers):
            share *= left.get(place, 1.0)
        places = [place for place in product.makers if place is not None and place not in left]
        layers = [place[0].rpartition(".")[0] for place in places]
        why = next((structures.unprunable[each] for each in layers if each in structures.unprunable), None)
        shares[_short(why) if why else "products of activations"] = (
            shares.get(_short(why) if why else "products of activations", 0.0) + share
        )
    whole = sum(product.macs for product in products)
    worst = sorted(shares.items(), key=lambda entry: -entry[1])[:3]
    return [f"{why} ({100 * share / whole:.0f} %)" for why, share in worst if share > 0.02 * whole]


def _generates(model: nn.Module, x: Any) -> str:
    """Whether tokens are the same with the cache and without, where the model generates any."""
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: False)():
        return ""
    given: dict[str, Tensor] = {k: v for k, v in x.items() if k in ("input_ids", "input_features")}
    texts = []
    for cache in (True, False):
        torch.manual_seed(0)
        start = {"decoder_start_token_id": 1} if "decoder_input_ids" in x else {}
        options: dict[str, Any] = start | dict(
            max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache
        )
        try:
            texts.append(model.generate(**given, **options))  # type: ignore[operator]
        except Exception as error:
            return f"fails {'with' if cache else 'without'} cache: {type(error).__name__}: {str(error)[:120]}"
    return "same" if torch.equal(*texts) else "differ"


# ------------------------------------------------------------------------------------------------------- the page

HEAD = """# Transformers

Written by `python benchmarks/transformer_table.py --page results/transformers.json`, not by hand. Small random-weight
models with their stock classes, default settings (`DepGraph()`, no `allow_inexact`, no `heads`); where a hidden state
is returned beside the predictions, these are named (`outputs=`).

- **Heads**, **KV groups** (a head of keys and values with all its queries), **FFN**, **residual width**, **experts**
  (channels inside of them): the structures of each layer group, or the number of the note that says why there are none.
  A dash: the model has none.
  Phi-3's are offsets in all heads and layers (pairs under rotary positions), since how many heads its fused layer has
  stands on a config that all layers share; Mamba's FFN is its inner width.
- **Left**: the share of MACs that is left after `Target(macs=0.25)`; where that is out of reach, after as much as
  there is, and the note says what keeps the rest.
- **Difference**: every second structure of every layer group is removed at once; the largest change of any output,
  relative to its largest element, against the full model with the same structures at zero, in double precision. Norms
  that compute in single precision whatever comes in (Llama's and its kin) leave 1e-7.
- **generate()**: eight tokens, after pruning for *left*, are the same with the cache and without.

"""

#: What goes exactly, and how: said once, above the table.
HOW = """## What goes exactly, and how

- Where a width is under an RMSNorm, γ is multiplied by √(D / D′) and ε by D / D′ when D positions become D′. Where
  scores are divided by the root of a head width that shrinks, the rows that make the queries (or the γ of a norm
  behind them) are multiplied by √(d′ / d). Both are done with the removal, undone with it, and followed by `load`,
  `prune_like` and `also=`. What has no such factor (LayerNorm takes a mean off, too) stays inexact, and needs
  `allow_inexact`; so does an RMSNorm without γ, or whose ε is no number on the module.
- Heads are offered by default, under grouped queries a head of keys and values with all its queries. With
  `heads={"q_proj": number of KV heads}` the structures are the queries instead: the same one of every group. With the
  number of heads of each of `q_proj`, `k_proj` and `v_proj` they are the offsets in all heads at once (pairs of them
  under rotary positions; where one `head_dim` is read for queries, keys and values, an offset goes from all three).
- `nn.MultiheadAttention` asserts that what goes in is as wide as what comes out of its heads, and keeps the number of
  heads: its heads stay, the offsets in all heads go together with the width around it, and its queries take the change
  of the scale. Under LayerNorm that width is inexact, and so the layer stays as it is.
- An integer that a forward pass reads only with an attention mask (`num_key_value_groups` of transformers) can only
  follow if the example inputs have one.
"""


def page(values: dict[str, Any]) -> str:
    """docs/transformers.md."""
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"({notes.setdefault(text, len(notes) + 1)})"

    kinds = KINDS[:-1]
    lines = [f"| model | {' | '.join(kinds)} | left % | difference | generate() |"]
    lines.append("| --- |" + " --- |" * len(kinds) + " ---: | ---: | --- |")
    for name, one in values["models"].items():
        if "error" in one:
            lines.append(f"| `{name}` | {note(one['error'])} |" + " |" * (len(kinds) + 2))
            continue
        row, reasons = [f"`{name}`"], _reasons(one["unprunable"])
        for kind in kinds:
            cell = _counts(one["kinds"][kind])
            row.append(cell or " ".join(map(note, reasons[kind])) or "—")
        kept = "".join(f" {note(why)}" for why in one["kept by"]) if one["left"] > TARGET + 0.005 else ""
        row.append(f"{100 * one['left']:.1f}{kept}")
        row += [
            f"{one['difference']:.0e}",
            note(one["generates"]) if "fails" in one["generates"] else one["generates"],
        ]
        lines.append("| " + " | ".join(row) + " |")
    listed = "\n".join(f"{k}. {text.replace('|', chr(92) + '|')}" for text, k in notes.items())
    packages = [
        each for each in ("torch", "transformers", "timm", "torchvision") if each in values["versions"]
    ]
    said = ", ".join(f"{each} {values['versions'][each]}" for each in packages)
    file = "[transformers.json](../results/transformers.json)"
    made = f"{values['machine']['processor']}, {said}: `{values['command']}`. File: {file}."
    table = "\n".join(lines)
    return f"{HEAD}{HOW}\n## The table\n\n{made}\n\n{table}\n\nNotes:\n\n{listed}\n"


def _counts(sizes: list[int]) -> str:
    """[4, 4, 128] → "2 × 4, 128"."""
    counts = {size: sizes.count(size) for size in sizes}
    return ", ".join(f"{n} × {size}" if n > 1 else str(size) for size, n in counts.items())


def _alone(name: str, limit: float) -> dict[str, Any]:
    """`look` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} s"}
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["no message"])[-1][:400]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each model")
    parser.add_argument("--out", type=Path, help="models that are not asked for stay in a file that is there")
    parser.add_argument("--page", type=Path, help="write docs/transformers.md from this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(look(options.one)))
        return
    if options.page:
        text = page(json.loads(options.page.read_text()))
        (Path(__file__).parents[1] / "docs" / "transformers.md").write_text(text)
        return
    known = json.loads(options.out.read_text())["models"] if options.out and options.out.exists() else {}
    for name in options.only:
        known[name] = one = _alone(name, options.limit)
        shown = (
            one.get("error")
            or f"left {one['left']:.3f}, difference {one['difference']:.1e}, {one['generates']}"
        )
        print(f"{name:40} {shown}", flush=True)
        if options.out:
            found = {
                "command": "python benchmarks/transformer_table.py --out results/transformers.json",
                "versions": lab.versions() | stock.versions(),
                "machine": lab.machine("cpu"),
                "models": {each: known[each] for each in MODELS if each in known},
            }
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
