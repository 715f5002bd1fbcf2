"""Layer knowledge: what the graph of operations does not say about torch's own layers.

Which attributes carry a width, what attention fixes beside its products, and which parameters are cut but never zeroed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from decay_pruning.graph.axes import OPERATION, Axes, Axis, Misaligned, Reason, divide, fix, leaves, unify
from decay_pruning.graph.trace import Trace
from decay_pruning.structures import Role


class Layer:
    """One layer, where its parameters and attributes are, and the axes of its first input and output."""

    def __init__(self, trace: Trace, module: Any, name: str) -> None:
        self.trace, self.module, self.name = trace, module, name
        self.called = module in trace.calls
        self.input, self.output = trace.calls.get(module, ([], []))

    def path(self, leaf: str) -> str:
        return f"{self.name}.{leaf}" if self.name else leaf

    def axis(self, leaf: str, d: int) -> Axis | None:
        """The axis of a parameter's dimension; tied parameters have one name."""
        dim = self.trace.dims.get((self.path(leaf), d))
        if dim is not None:
            return dim.axis
        *path, last = leaf.split(".")
        owner = self.module
        for part in path:
            owner = owner._modules[part]
        # never by getattr: a parametrized weight would be computed anew, and its power iteration go on
        known = self.trace._tensors.get(id(owner._parameters.get(last)))
        return known[1][d] if known else None

    def role(self, leaf: str, *roles: Role) -> None:
        for d, role in enumerate(roles):
            dim = self.trace.dims.get((self.path(leaf), d))
            if dim is not None:
                dim.role = role

    def attribute(self, leaf: str, axis: Axis | None, d: int = 0) -> None:
        """Say that a module attribute (or one number of a tuple) is the size of an axis."""
        if axis is not None:
            self.trace.attributes[self.path(leaf), d] = axis

    def at(self, axes: Axes, d: int) -> Axis | None:
        return axes[d] if self.called and -len(axes) <= d < len(axes) else None


def _conv(layer: Layer) -> None:
    m, d = layer.module, -1 - len(layer.module.kernel_size)
    rows = int(m.transposed)
    one = m.groups == 1
    layer.attribute(
        "in_channels", layer.at(layer.input, d) or (layer.axis("weight", 1 - rows) if one else None)
    )
    layer.attribute(
        "out_channels", layer.at(layer.output, d) or (layer.axis("weight", rows) if one else None)
    )
    if m.groups > 1:
        layer.attribute("groups", layer.trace.groups.get(m))


def _linear(layer: Layer) -> None:
    layer.attribute("in_features", layer.axis("weight", 1) or layer.at(layer.input, -1))
    layer.attribute("out_features", layer.axis("weight", 0) or layer.at(layer.output, -1))


def _bilinear(layer: Layer) -> None:
    for d, leaf in enumerate(("out_features", "in1_features", "in2_features")):
        layer.attribute(leaf, layer.axis("weight", d))


def _batch_norm(layer: Layer) -> None:
    layer.attribute(
        "num_features", layer.axis("weight", 0) or layer.axis("running_mean", 0) or layer.at(layer.input, 1)
    )


def _layer_norm(layer: Layer) -> None:
    shape = layer.module.normalized_shape
    for d in range(len(shape)):
        layer.attribute(
            "normalized_shape", layer.axis("weight", d) or layer.at(layer.input, d - len(shape)), d
        )


def _rms_norm(layer: Layer) -> None:
    layer.role("weight", *(Role.SCALE for _ in layer.module.normalized_shape))
    _layer_norm(layer)


def _group_norm(layer: Layer) -> None:
    layer.attribute("num_channels", layer.axis("weight", 0) or layer.at(layer.input, 1))
    layer.attribute("num_groups", layer.trace.groups.get(layer.module))


def _prelu(layer: Layer) -> None:
    layer.role("weight", Role.OTHER)
    if layer.module.num_parameters > 1:
        layer.attribute("num_parameters", layer.axis("weight", 0))


def _embedding(layer: Layer) -> None:
    layer.attribute("embedding_dim", layer.axis("weight", 1))


def _recurrent(layer: Layer) -> None:
    """All layers and directions share one `hidden_size`."""
    m = layer.module
    width = layer.axis("weight_hh_l0", 1)
    if width is None or not layer.called:
        return
    for name, _ in m.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            layer.role(name, Role.ROW, Role.COLUMN)
            _join(layer, width, layer.axis(name, 1))
        elif name.startswith("weight_ih"):
            layer.role(name, Role.ROW, Role.COLUMN)
        else:
            layer.role(name, Role.BIAS)
    if m.proj_size:
        fix(width, Reason(OPERATION, f"is projected inside of {layer.trace.name(m)}"))
    layer.attribute("hidden_size", width)
    layer.attribute("input_size", layer.axis("weight_ih_l0", 1))


def _recurrent_cell(layer: Layer) -> None:
    width = layer.axis("weight_hh", 1)
    layer.role("weight_hh", Role.ROW, Role.COLUMN)
    layer.role("weight_ih", Role.ROW, Role.COLUMN)
    layer.attribute("hidden_size", width)
    layer.attribute("input_size", layer.axis("weight_ih", 1))


def _attention(layer: Layer) -> None:
    """The width that goes in is the width inside, and its heads stay: the layer asserts both."""
    m = layer.module
    layer.role("in_proj_weight", Role.ROW, Role.COLUMN)
    layer.role("in_proj_bias", Role.BIAS)
    for leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        layer.role(leaf, Role.ROW, Role.COLUMN)
    width = layer.axis("out_proj.weight", 0)
    inner = layer.axis("out_proj.weight", 1)
    if width is None or inner is None:
        return
    packed = layer.axis("in_proj_weight", 0)
    if packed is not None:
        try:
            three, inside = divide(packed, 3)
        except Misaligned:
            three, inside = packed, inner
        fix(three, Reason(OPERATION, "counts queries, keys and values"))
        _join(layer, inner, inside)
        _join(layer, width, layer.axis("in_proj_weight", 1))
    else:
        _join(layer, inner, layer.axis("q_proj_weight", 0))
        _join(layer, width, layer.axis("q_proj_weight", 1))
    _join(layer, width, inner)
    layer.attribute("embed_dim", width)
    for leaf in ("kdim", "vdim"):
        layer.attribute(leaf, width if packed is not None else layer.axis(f"{leaf[0]}_proj_weight", 1))
    layer.attribute("out_proj.in_features", inner)
    layer.attribute("out_proj.out_features", width)
    try:
        heads, offsets = divide(width, m.num_heads)
    except Misaligned:
        fix(width, Reason(OPERATION, f"is cut into heads by {layer.trace.name(m)}"))
        return
    for atom in leaves(heads):
        atom.count = True
    layer.attribute("head_dim", offsets)


def _join(layer: Layer, a: Axis | None, b: Axis | None) -> None:
    if a is None or b is None:
        return
    try:
        unify(a, b)
    except Misaligned:
        for axis in (a, b):
            fix(axis, Reason(OPERATION, f"does not fit in {layer.trace.name(layer.module)}"))


#: Layer type → what it adds. The first type that fits counts.
LAYERS: tuple[tuple[type[nn.Module], Callable[[Layer], None]], ...] = (
    (_ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (_NormBase, _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _rms_norm),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _prelu),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
)


def describe(trace: Trace) -> None:
    """Add what is known of every layer to a trace."""
    for module, name in trace.modules.items():
        for kind, add in LAYERS:
            if isinstance(module, kind):
                add(Layer(trace, module, name))
                break
    _directions(trace)


def _directions(trace: Trace) -> None:
    """What a weight is divided by is cut and never zeroed: rows of zeros have no norm. Their lengths decay instead."""
    for (names, lengths), divisor in trace.directions.items():
        rows = _atoms(divisor)
        if lengths is not None:
            scales = [dim for dim in trace.dims.values() if dim.place[0] in lengths & trace.parameters.keys()]
            scales = [dim for dim in scales if dim.role is not Role.COLUMN and rows & _atoms([dim.axis])]
            rows &= _atoms([dim.axis for dim in scales])
            for dim in scales:
                dim.role = Role.ROW
        for dim in trace.dims.values():
            if dim.place[0] in names and dim.role is not Role.COLUMN and rows & _atoms([dim.axis]):
                dim.role = Role.BUFFER


def _atoms(axes: Axes) -> set[int]:
    return {id(atom) for axis in axes for atom in leaves(axis) if atom.size > 1}
