"""Pruned models that stock classes of Transformers load, from small configs."""

import pytest
import torch

from decay_pruning import ConfigError, DepGraph, ManifestError, Pruner, SmoothPruning, Target
from decay_pruning.configs import Sizes

transformers = pytest.importorskip("transformers")
from decay_pruning.integrations.huggingface import save  # noqa: E402

WORDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
LM = {**BASE, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
#: name → (class, config, its settings)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**LM, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LM),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LM, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", LM),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**LM, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    }),
    "bert": ("BertForSequenceClassification", "BertConfig", BASE),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {
        "vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32,
    }),
    "vit": ("ViTForImageClassification", "ViTConfig", {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 8,
    }),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
        "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "decoder_start_token_id": 1,
    }),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "eos_token_id": None,
    }),
}  # fmt: skip


def build(name, **changes):
    torch.manual_seed(0)
    kind, config, settings = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**settings, **changes}))
    for p in model.parameters():  # biases and norms, too, have something to say
        torch.nn.init.normal_(p, p.detach().mean().item(), 0.1)
    return model.eval()


def inputs(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    if name == "whisper":
        sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
        return {"input_features": sound, "decoder_input_ids": WORDS}
    return {"input_ids": WORDS, **({"decoder_input_ids": WORDS} if name == "t5" else {})}


def prune(model, name, keep=0.7, **settings):
    given = {"uniform": True, "importance": "magnitude", "scope": "local", **settings}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(
        model,
        inputs(name),
        optimizer,
        Target(macs=keep),
        host=DepGraph(**given),
        smooth=SmoothPruning(steps=2),
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs(name))[0].float().square().mean().backward()
        optimizer.step()
    return pruner.finish()


def generated(model, name, **settings):
    given = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
    return model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_stock_from_pretrained_loads_it(tmp_path, name):
    model = build(name)
    # Gemma multiplies its embeddings by the root of a width that it reads from its config.
    names = set(prune(model, name, ignored=["model.embed_tokens"] if name == "gemma" else []).widths)
    assert save(model, tmp_path, inputs(name)) == 0.0
    again = type(model).from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in build(name).parameters())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no scratch is left"
    if hasattr(model, "generate") and name not in ("bert", "distilbert", "vit"):
        with_cache, without = generated(model, name), generated(model, name, use_cache=False)
        assert torch.equal(with_cache, without) and torch.equal(with_cache, generated(again, name))
    assert names


@pytest.mark.parametrize(("name", "rounds"), [("llama", {"round_to": 4}), ("qwen2", {}), ("vit", {})])
def test_the_width_of_the_model_itself(tmp_path, name, rounds):
    """Inexact by its nature; the config then says hidden_size, too."""
    model = build(name)
    prune(model, name, 0.5, allow_inexact=True, **rounds)
    assert save(model, tmp_path) == 0.0
    config = type(model.config).from_pretrained(tmp_path)
    assert config.hidden_size < 32 and config.intermediate_size < 64
    assert model.config.hidden_size == 32, "the model keeps its own config"


def test_a_width_that_no_config_says_stays_or_is_refused(tmp_path):
    """Qwen3 has one ε for norms of two widths; Gemma reads a scale from the width in its config."""
    model = build("qwen3")
    prune(model, "qwen3")
    assert save(model, tmp_path / "qwen3") == 0.0
    assert type(model.config).from_pretrained(tmp_path / "qwen3").hidden_size == 32
    model = build("gemma")
    prune(model, "gemma")
    with pytest.raises(ManifestError, match="Keep that width"):
        save(model, tmp_path / "gemma")
    assert not (tmp_path / "gemma").exists()


@pytest.mark.parametrize(("name", "numbers"), [
    ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}),
    ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("vit", {"num_attention_heads": 2, "head_dim": 8}),
    ("t5", {"num_heads": 2}),
])  # fmt: skip
def test_heads(tmp_path, name, numbers):
    model = build(name)
    ffn = [n for n, _ in model.named_modules() if n.endswith(("mlp", "DenseReluDense"))]
    prune(model, name, 0.85 if name != "t5" else 0.75, ignored=ffn)
    save(model, tmp_path, inputs(name))
    config = type(model.config).from_pretrained(tmp_path)
    assert {key: getattr(config, key) for key in numbers} == numbers


def test_what_no_config_names_is_kept():
    model = build("bert")
    report = prune(model, "bert", 0.75)
    changed = {name for name, (before, after) in report.widths.items() if before != after}
    assert changed == {f"bert.encoder.layer.{k}.intermediate.dense" for k in range(2)}
    assert model.bert.pooler.dense.out_features == 32


def test_widths_that_differ_by_layer_are_refused_by_name(tmp_path):
    model = build("mistral")
    prune(model, "mistral", 0.7, uniform=False, scope="global")
    widths = {layer.mlp.gate_proj.out_features for layer in model.model.layers}
    assert len(widths) == 2, "the example is to differ"
    with pytest.raises(ConfigError, match=r"intermediate_size is one number.*DepGraph\(uniform=True\)"):
        save(model, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_widths_that_differ_by_layer_where_the_config_takes_a_list():
    """Gemma 3n names the width of each layer."""
    kind = transformers.models.gemma3n.modeling_gemma3n.Gemma3nForCausalLM
    config = transformers.models.gemma3n.configuration_gemma3n.Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=[64, 64, 64], num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.0, 0.0],
        layer_types=["full_attention"] * 3, pad_token_id=0,
    )  # fmt: skip
    sizes = Sizes(kind(config))
    values = sizes.changed({"intermediate_size": [64, 40, 56]})
    assert sizes.built(values)["model.layers.1.mlp.gate_proj.weight"][0] == 40


def test_pruned_heads_that_no_config_names_are_refused(tmp_path):
    model = build("bert")
    prune(
        model, "bert", 0.9, uniform=False, ignored=[f"bert.encoder.layer.{k}.intermediate" for k in range(2)]
    )
    with pytest.raises(ConfigError, match=r"no number of BertConfig|is one number"):
        save(model, tmp_path)


def test_another_function_is_refused_and_nothing_is_written(tmp_path):
    """What the class computes with beside the shapes is found by the proof."""
    model = build("llama")
    prune(model, "llama")
    model.model.layers[0].self_attn.scaling *= 2
    with pytest.raises(ManifestError, match="outputs differ"):
        save(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_of_another_kind(tmp_path):
    with pytest.raises(ConfigError, match="a model of Transformers, not Linear"):
        save(torch.nn.Linear(2, 2), tmp_path)


def test_old_weights_do_not_stay_beside_the_new(tmp_path):
    model = build("bert")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "vocab.txt").write_text("words")
    save(model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "vocab.txt" in names and "model-00001-of-00002.safetensors" not in names
    assert {"config.json", "model.safetensors"} <= names


def test_push_to_hub(monkeypatch):
    """By the interface of huggingface_hub alone."""
    hub = pytest.importorskip("huggingface_hub")
    from decay_pruning.integrations.huggingface import push_to_hub

    sent = {}

    class Api:
        def create_repo(self, repo, **options):
            sent["repo"] = repo, options

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            sent["config"] = transformers.BertConfig.from_pretrained(folder_path)
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(hub, "HfApi", Api)
    model = build("bert")
    prune(model, "bert", 0.75)
    assert push_to_hub(model, "me/small", private=True) == "https://hub/me/small/commit/1"
    assert sent["repo"] == ("me/small", {"exist_ok": True, "private": True})
    assert sent["config"].intermediate_size < 64
