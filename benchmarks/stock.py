"""Stock models of other packages, by name, with random weights and example inputs.

torchvision, timm, segmentation_models_pytorch, ultralytics, diffusers and transformers: `make models` installs them.
Nothing in the library needs them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn

#: Package → name on the package index.
PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "smp": "segmentation-models-pytorch",
    "ultralytics": "ultralytics",
    "diffusers": "diffusers",
    "hf": "transformers",
}
#: A model and its example inputs.
Built = tuple[nn.Module, Any]
_OPERATORS: list[Any] = []  # a library of operators lives as long as its object


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES.values():
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def build(name: str) -> Built:
    """A model by `package:name`, and example inputs: a batch of two.

    Raises:
        KeyError: there is no such model.
        ImportError: its package is not installed.
    """
    torch.manual_seed(0)
    os.environ.setdefault("YOLO_CONFIG_DIR", os.devnull)
    _torchvision()
    return MODELS[name]()


class Last(nn.Module):
    """The predictions of a model that returns more beside them."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._pick = pick

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._pick(self.model(*args, **kwargs))


# ---------------------------------------------------------------------------------------------- torchvision


def _torchvision() -> None:
    """Import torchvision, also where its own operators do not load beside this build of torch."""
    with suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
            operators = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
            operators.impl("nms", _nms, "CPU")
            _OPERATORS.append(operators)
            importlib.import_module("torchvision")
            extension = importlib.import_module("torchvision.extension")
            extension._has_ops = lambda: True  # type: ignore[attr-defined]


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Non-maximum suppression."""
    low, high = (
        torch.maximum(boxes[:, None, :2], boxes[:, :2]),
        torch.minimum(boxes[:, None, 2:], boxes[:, 2:]),
    )
    shared = (high - low).clamp_min(0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    overlap = shared / (area[:, None] + area - shared)
    order = scores.argsort(descending=True)
    kept: list[int] = []
    while order.numel():
        kept.append(int(order[0]))
        order = order[1:][overlap[kept[-1], order[1:]] <= threshold]
    return torch.tensor(kept, dtype=torch.int64)


def _images(size: int = 128, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def _tv(name: str, size: int = 128, **options: Any) -> Built:
    models = importlib.import_module("torchvision.models")
    return models.get_model(name, weights=None, **options), _images(size)


def _segmentation(name: str) -> Built:
    models = importlib.import_module("torchvision.models.segmentation")
    model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=5)
    return Last(model, lambda out: out["out"]), _images(128)


def _detector(name: str) -> Built:
    """Backbone and head, without the boxes."""
    models = importlib.import_module("torchvision.models.detection")
    whole = getattr(models, name)(weights=None, weights_backbone=None, num_classes=5)
    return _Detector(whole), _images(128)


class _Detector(nn.Module):
    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = whole.backbone
        self.head: Any = whole.head

    def forward(self, x: torch.Tensor) -> Any:
        found: dict[str, torch.Tensor] = self.backbone(x)
        return self.head(list(found.values()))


def _whole_detector(name: str) -> Built:
    models = importlib.import_module("torchvision.models.detection")
    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=5), [list(_images(320))]


# -------------------------------------------------------------------------------------------------- others


def _timm(name: str) -> Built:
    model = importlib.import_module("timm").create_model(name)
    channels, size, _ = model.default_cfg["input_size"]
    return model, _images(size if model.default_cfg.get("fixed_input_size") else 128, channels)


def _smp(kind: str, encoder: str) -> Built:
    smp = importlib.import_module("segmentation_models_pytorch")
    return getattr(smp, kind)(encoder_name=encoder, encoder_weights=None, classes=5), _images(128)


def _yolo(name: str, kind: str) -> Built:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return getattr(tasks, kind)(f"{name}.yaml", verbose=False), _images(128)


def _unet2d() -> Built:
    diffusers = importlib.import_module("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return Last(model, lambda out: out.sample), (_images(32), torch.tensor([3, 7]))


def _unet_sd() -> Built:
    diffusers = importlib.import_module("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    text = torch.randn(2, 7, 32)
    return Last(model, lambda out: out.sample), (_images(16, 4), torch.tensor([3, 7]), text)


def _vae() -> Built:
    diffusers = importlib.import_module("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    return Last(model, lambda out: out.sample), _images(32)


_LLM: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
)
_GQA: dict[str, Any] = _LLM | dict(num_key_value_heads=2, pad_token_id=0)
_VISION: dict[str, Any] = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    image_size=32,
    patch_size=8,
)


def _hf(config: str, kind: str, settings: Mapping[str, Any], inputs: str = "tokens") -> Built:
    """A small instance of an architecture; `inputs` says what it reads."""
    transformers = importlib.import_module("transformers")
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    tokens: Any = torch.randint(3, 64, (2, 12))
    given: dict[str, Any] = {
        "tokens": {"input_ids": tokens},
        "images": {"pixel_values": _images(32)},
        "large images": {"pixel_values": _images(64)},
        "sound": {"input_values": torch.randn(2, 4000)},
        "spectrum": {
            "input_features": torch.randn(2, 80, 40),
            "decoder_input_ids": tokens[:, :6],
            "use_cache": False,
        },
        "two sequences": {"input_ids": tokens, "decoder_input_ids": tokens[:, :6], "use_cache": False},
        "text and images": {"input_ids": tokens, "pixel_values": _images(32)},
        "no cache": {"input_ids": tokens, "use_cache": False},
    }[inputs]
    return model.eval(), given


def _clip() -> Built:
    settings = dict(text_config=_LLM, vision_config=_VISION, projection_dim=32)
    return _hf("CLIPConfig", "CLIPModel", settings, "text and images")


# ------------------------------------------------------------------------------------------------- the list

_TORCHVISION = [
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
    "swin_t",
]
_TIMM = [
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
    "vit_small_patch14_dinov2",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "mixer_s32_224",
    "efficientformer_l1",
    "resmlp_12_224",
]
_HF: dict[str, tuple[Any, ...]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA, "no cache"),
    "llama_mha": ("LlamaConfig", "LlamaForCausalLM", _LLM | dict(pad_token_id=0), "no cache"),
    "llama_eager": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _GQA | dict(attn_implementation="eager"),
        "no cache",
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA, "no cache"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GQA | dict(head_dim=16), "no cache"),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GQA, "no cache"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GQA | dict(head_dim=16), "no cache"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GQA | dict(head_dim=16), "no cache"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _GQA | dict(num_local_experts=4), "no cache"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GQA, "no cache"),
    "bert": ("BertConfig", "BertForSequenceClassification", _LLM),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        dict(vocab_size=64, dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=64, n_embd=64, n_layer=2, n_head=4),
        "no cache",
    ),
    "gptneox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _LLM, "no cache"),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {k: v for k, v in _LLM.items() if k != "intermediate_size"}
        | dict(ffn_dim=128, word_embed_proj_dim=64),
        "no cache",
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _VISION, "images"),
    "dinov2": (
        "Dinov2Config",
        "Dinov2ForImageClassification",
        {k: v for k, v in _VISION.items() if k != "intermediate_size"} | dict(mlp_ratio=2),
        "images",
    ),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        dict(image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4),
        "large images",
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        dict(depths=[1] * 4),
        "large images",
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
        "two sequences",
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        dict(
            vocab_size=64,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_source_positions=20,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        "spectrum",
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        {k: v for k, v in _LLM.items() if k != "max_position_embeddings"}
        | dict(
            conv_dim=(32,) * 3,
            conv_stride=(5, 4, 4),
            conv_kernel=(10, 8, 4),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
        ),
        "sound",
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        dict(vocab_size=64, hidden_size=64, state_size=8, num_hidden_layers=2),
        "no cache",
    ),
}

#: All models of this list, by `package:name`.
MODELS: dict[str, Callable[[], Built]] = {
    **{f"torchvision:{n}": partial(_tv, n) for n in _TORCHVISION},
    "torchvision:googlenet": lambda: _tv("googlenet", init_weights=False),
    "torchvision:inception_v3": lambda: _tv("inception_v3", init_weights=False),
    "torchvision:vit_b_16": lambda: _tv("vit_b_16", 224),
    "torchvision:deeplabv3_mobilenet": lambda: _segmentation("deeplabv3_mobilenet_v3_large"),
    "torchvision:lraspp_mobilenet": lambda: _segmentation("lraspp_mobilenet_v3_large"),
    "torchvision:fcn_resnet50": lambda: _segmentation("fcn_resnet50"),
    "torchvision:ssdlite": lambda: _detector("ssdlite320_mobilenet_v3_large"),
    "torchvision:ssdlite_whole": lambda: _whole_detector("ssdlite320_mobilenet_v3_large"),
    "torchvision:retinanet": lambda: _detector("retinanet_resnet50_fpn"),
    "torchvision:fcos": lambda: _detector("fcos_resnet50_fpn"),
    **{f"timm:{n}": partial(_timm, n) for n in _TIMM},
    "ultralytics:yolov8n": lambda: _yolo("yolov8n", "DetectionModel"),
    "ultralytics:yolo11n": lambda: _yolo("yolo11n", "DetectionModel"),
    "ultralytics:yolov5nu": lambda: _yolo("yolov5n", "DetectionModel"),
    "ultralytics:yolov8n_seg": lambda: _yolo("yolov8n-seg", "SegmentationModel"),
    "ultralytics:yolov8n_cls": lambda: _yolo("yolov8n-cls", "ClassificationModel"),
    "smp:Unet_resnet18": lambda: _smp("Unet", "resnet18"),
    "smp:FPN_resnet18": lambda: _smp("FPN", "resnet18"),
    "smp:DeepLabV3Plus_mobilenet_v2": lambda: _smp("DeepLabV3Plus", "mobilenet_v2"),
    "smp:UnetPlusPlus_resnet18": lambda: _smp("UnetPlusPlus", "resnet18"),
    "smp:Segformer_mit_b0": lambda: _smp("Segformer", "mit_b0"),
    **{f"hf:{n}": partial(_hf, *given) for n, given in _HF.items()},
    "hf:clip": _clip,
    "diffusers:unet2d": _unet2d,
    "diffusers:unet_sd": _unet_sd,
    "diffusers:vae": _vae,
}
