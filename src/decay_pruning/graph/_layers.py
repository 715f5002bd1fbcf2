"""Layers: which positions of which tensors one channel of a layer occupies, for each layer type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch_pruning import ops

from decay_pruning.graph._trace import Indices, Untraceable
from decay_pruning.structures import Role


@dataclass
class Slice:
    """Where the channels `index` of one layer lie: position of `tensor` along `dim`. `root` runs parallel."""

    tensor: str
    dim: int
    role: Role | None  # None: a tie only, nothing is cut here
    position: Indices
    root: Indices


@dataclass
class Layer:
    """Collects the slices of one layer, skipping tensors that it does not have."""

    name: str
    module: Any
    root: Indices
    parameters: Mapping[int, str]
    slices: list[Slice] = field(default_factory=list)

    def tensor(self, leaf: str, dim: int, role: Role, position: Indices, root: Indices | None = None) -> None:
        value = self.module
        for part in leaf.split("."):
            value = getattr(value, part, None)
        if value is None:
            return
        name = self.path(leaf)
        if role is not Role.BUFFER:
            if id(value) not in self.parameters:
                raise Untraceable(
                    f"{name!r} is computed from other tensors (weight norm, a parametrization or a mask); "
                    "make it a plain parameter first"
                )
            name = self.parameters[id(value)]
        self.slices.append(Slice(name, dim % value.ndim, role, position, self.root if root is None else root))

    def attribute(self, leaf: str, position: Indices, dim: int = 0) -> None:
        self.slices.append(Slice(self.path(leaf), dim, Role.ATTRIBUTE, position, self.root))

    def tie(self, leaf: str, position: Indices) -> None:
        self.slices.append(Slice(self.path(leaf), 0, None, position, self.root))

    def path(self, leaf: str) -> str:
        return f"{self.name}.{leaf}" if self.name else leaf


def _conv(layer: Layer, i: Indices, out: bool) -> None:
    m = layer.module
    rows = int(m.transposed)
    if out:
        per_group = m.out_channels // m.groups
        layer.tensor("weight", rows, Role.ROW, i % per_group if m.transposed else i)
        layer.tensor("bias", 0, Role.BIAS, i)
        layer.attribute("out_channels", i)
    else:
        per_group = m.in_channels // m.groups
        layer.tensor("weight", 1 - rows, Role.COLUMN, i if m.transposed else i % per_group)
        layer.attribute("in_channels", i)
    if m.groups > 1:
        layer.tie("(out groups)" if out else "(in groups)", i % per_group)


def _depthwise(layer: Layer, i: Indices, out: bool) -> None:
    m = layer.module
    if m.in_channels != m.groups:
        raise Untraceable(
            f"grouped convolution {layer.name!r} with {m.in_channels} inputs in {m.groups} groups of one output each "
            "is not supported"
        )
    layer.tensor("weight", 0, Role.ROW, i)
    layer.tensor("bias", 0, Role.BIAS, i)
    for leaf in ("in_channels", "out_channels", "groups"):
        layer.attribute(leaf, i)


def _linear(layer: Layer, i: Indices, out: bool) -> None:
    if out:
        layer.tensor("weight", 0, Role.ROW, i)
        layer.tensor("bias", 0, Role.BIAS, i)
        layer.attribute("out_features", i)
    else:
        layer.tensor("weight", 1, Role.COLUMN, i)
        layer.attribute("in_features", i)


def _batch_norm(layer: Layer, i: Indices, out: bool) -> None:
    layer.tensor("weight", 0, Role.SCALE, i)
    layer.tensor("bias", 0, Role.SHIFT, i)
    layer.tensor("running_mean", 0, Role.BUFFER, i)
    layer.tensor("running_var", 0, Role.BUFFER, i)
    layer.attribute("num_features", i)


def _layer_norm(layer: Layer, i: Indices, out: bool) -> None:
    if len(layer.module.normalized_shape) != 1:
        raise Untraceable(f"LayerNorm {layer.name!r} normalises over several dimensions at once")
    layer.tensor("weight", 0, Role.SCALE, i)
    layer.tensor("bias", 0, Role.SHIFT, i)
    layer.attribute("normalized_shape", i)


def _group_norm(layer: Layer, i: Indices, out: bool) -> None:
    m = layer.module
    layer.tensor("weight", 0, Role.SCALE, i)
    layer.tensor("bias", 0, Role.SHIFT, i)
    layer.attribute("num_channels", i)
    layer.attribute("num_groups", i // (m.num_channels // m.num_groups))


def _prelu(layer: Layer, i: Indices, out: bool) -> None:
    if layer.module.num_parameters > 1:
        layer.tensor("weight", 0, Role.OTHER, i)
        layer.attribute("num_parameters", i)


def _embedding(layer: Layer, i: Indices, out: bool) -> None:
    layer.tensor("weight", 1, Role.ROW, i)
    layer.attribute("embedding_dim", i)


def _attention(layer: Layer, i: Indices, out: bool) -> None:
    m = layer.module
    if not m._qkv_same_embed_dim:
        raise Untraceable(f"attention {layer.name!r} has keys or values of another width than its queries")
    width, root = m.embed_dim, layer.root
    three, roots = np.concatenate([i, i + width, i + 2 * width]), np.tile(root, 3)
    layer.attribute("embed_dim", i)
    layer.tensor("in_proj_weight", 0, Role.ROW, three, roots)
    layer.tensor("in_proj_weight", 1, Role.COLUMN, i)
    layer.tensor("in_proj_bias", 0, Role.BIAS, three, roots)
    layer.tensor("bias_k", 2, Role.OTHER, i)
    layer.tensor("bias_v", 2, Role.OTHER, i)
    layer.tensor("out_proj.weight", 0, Role.ROW, i)
    layer.tensor("out_proj.weight", 1, Role.COLUMN, i)
    layer.tensor("out_proj.bias", 0, Role.BIAS, i)
    for leaf in ("kdim", "vdim", "out_proj.in_features", "out_proj.out_features"):
        layer.attribute(leaf, i)
    layer.attribute("head_dim", i % m.head_dim)


TABLE: dict[Any, Callable[[Layer, Indices, bool], None]] = {
    ops.OPTYPE.CONV: _conv,
    ops.OPTYPE.DEPTHWISE_CONV: _depthwise,
    ops.OPTYPE.LINEAR: _linear,
    ops.OPTYPE.BN: _batch_norm,
    ops.OPTYPE.IN: _batch_norm,
    ops.OPTYPE.LN: _layer_norm,
    ops.OPTYPE.GN: _group_norm,
    ops.OPTYPE.PRELU: _prelu,
    ops.OPTYPE.EMBED: _embedding,
    ops.OPTYPE.MHA: _attention,
}


#: Layers that mix their whole width, so that taking one channel away changes the others by their nature.
MIXES: dict[Any, str] = {
    ops.OPTYPE.LN: "LayerNorm {!r} normalises over this width",
    ops.OPTYPE.MHA: "attention {!r} scales its scores by the head width",
}
