"""What share of real models can be pruned: one process and one time limit for each model.

    python benchmarks/coverage.py --out results/coverage.json            # all models whose packages are installed
    python benchmarks/coverage.py --only timm:resnet50 hf:bert --limit 60

Random weights. Of each model: seconds of one forward pass and of the search, the share of MACs in layers of a layer
group, what is left if each layer group keeps one structure, and whether half of all structures can be removed, proven.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from decay_pruning.lab import results as lab

TORCHVISION = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "vgg16_bn",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "vit_b_16",
    "swin_t",
]
TIMM = [
    "efficientnet_b0",
    "convnext_atto",
    "ghostnet_100",
    "repvgg_a0",
    "hrnet_w18_small",
    "mobilevit_s",
    "poolformer_s12",
    "edgenext_xx_small",
    "regnety_004",
    "resnetv2_50",
    "resnetv2_50x1_bit",
    "mobilenetv4_conv_small",
    "fastvit_t8",
    "cspdarknet53",
    "resnest14d",
    "nf_resnet26",
    "rexnet_100",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "mixer_s32_224",
    "efficientformer_l1",
    "resmlp_12_224",
]
#: Name → (config class, model class, settings) of transformers.
_SMALL = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)
_GQA = _SMALL | dict(num_key_value_heads=2)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _SMALL),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(vocab_size=64, n_embd=64, n_layer=2, n_head=4)),
    "gptneox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SMALL),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        dict(
            vocab_size=64,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=128,
            word_embed_proj_dim=64,
            max_position_embeddings=64,
        ),
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GQA | dict(head_dim=16)),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GQA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GQA | dict(head_dim=16)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GQA | dict(pad_token_id=0)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _GQA | dict(num_local_experts=4)),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        dict(vocab_size=64, hidden_size=64, state_size=8, num_hidden_layers=2),
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    ),
}


def build(name: str) -> tuple[Any, Any]:
    """A model by `package:name`, and example inputs."""
    import torch

    torch.manual_seed(0)
    package, _, leaf = name.partition(":")
    if package == "torchvision":
        models = importlib.import_module("torchvision.models")
        options = {"init_weights": False} if leaf in ("googlenet", "inception_v3") else {}
        size = 299 if leaf == "inception_v3" else 224
        return models.get_model(leaf, weights=None, **options), torch.randn(2, 3, size, size)
    if package == "timm":
        model = importlib.import_module("timm").create_model(leaf)
        return model, torch.randn(2, *model.default_cfg["input_size"])
    transformers = importlib.import_module("transformers")
    config, kind, settings = TRANSFORMERS[leaf]
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    inputs = {"input_ids": torch.randint(3, 64, (2, 12))}
    if leaf == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 64, (2, 6))
    return model, {**inputs, "use_cache": False} if leaf != "bert" else inputs


def look(name: str) -> dict[str, Any]:
    """What the library makes of one model."""
    import torch

    from decay_pruning import surgery
    from decay_pruning.budget import CostModel
    from decay_pruning.graph import Graph

    torch.set_num_threads(1)
    model, x = build(name)
    surgery.observe(model, x)
    start = time.perf_counter()
    surgery.observe(model, x)
    found: dict[str, Any] = {"forward": time.perf_counter() - start}
    start = time.perf_counter()
    Graph(model, x, verify=False)
    found["traced"] = time.perf_counter() - start
    start = time.perf_counter()
    structures = Graph(model, x).structures
    found["searched"] = time.perf_counter() - start
    found["groups"] = len(structures.groups)
    found["unprunable"] = dict(structures.unprunable)
    costs = CostModel(model, x, structures)
    gone = {key: torch.arange(len(group)) > 0 for key, group in structures.groups.items()}
    found["least"] = costs.after(gone).macs / max(1, costs.now.macs)
    half = {
        key: group.ids[::2].tolist() if len(group) > 2 else [] for key, group in structures.groups.items()
    }
    try:
        surgery.remove(model, structures, half, example_inputs=x)
        found["removed"] = True
    except Exception as error:
        found["removed"] = f"{type(error).__name__}: {error}"[:300]
    return found


def _versions() -> dict[str, str]:
    """Of the library and of the packages that the models come from."""
    found = lab.versions()
    for name in ("torchvision", "timm", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [
        *(f"torchvision:{n}" for n in TORCHVISION),
        *(f"timm:{n}" for n in TIMM),
        *(f"hf:{n}" for n in TRANSFORMERS),
    ]
    parser.add_argument("--only", nargs="+", default=every)
    parser.add_argument("--limit", type=float, default=120, help="seconds for each model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(look(options.one)))
        return
    results: dict[str, Any] = {}
    for name in options.only:
        try:
            command = [sys.executable, "-W", "ignore", __file__, "--one", name]
            run = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
            results[name] = (
                json.loads(run.stdout.splitlines()[-1])
                if run.returncode == 0
                else {"error": run.stderr.strip().splitlines()[-1][:400]}
            )
        except subprocess.TimeoutExpired:
            results[name] = {"error": f"not done in {options.limit:.0f} s"}
        one = results[name]
        if "error" in one:
            print(f"{name:40} {one['error'][:200]}", flush=True)
        else:
            seconds = ", ".join(f"{key} {one[key]:.2f}" for key in ("forward", "traced", "searched"))
            counts = f"{one['groups']} layer groups, {len(one['unprunable'])} refused"
            print(
                f"{name:40} {seconds} s; {counts}; least {one['least']:.0%}; removed: {one['removed']}",
                flush=True,
            )
        if options.out:
            found = {
                "command": " ".join(["python", *sys.argv]),
                "versions": _versions(),
                "machine": lab.machine("cpu"),
                "models": results,
            }
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
