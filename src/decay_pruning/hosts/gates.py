"""Gates: one number per channel that turns it off, and what the loss would lose with each of them.

A gated batch-norm computes (x̂ + β')·φ in place of x̂·γ + β, with φ = γ and β' = β/γ: the same function, but now one
number per channel, the gate φ, turns the whole channel off. What the loss would lose is |φ·∂L/∂φ|, to first order.

Multiplying a channel by φ = 1 behind a layer is multiplying its weights, so φ·∂L/∂φ = Σ w·∂L/∂w over them: layers
without batch-norm have *virtual* gates, and nothing has to be inserted. In a gated batch-norm the only weight is φ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from decay_pruning.slices import Sums
from decay_pruning.structures import Coupling, LayerGroup, Place, Role, StructureSet

logger = logging.getLogger("decay_pruning")

#: A batch-norm with |β| > 10 |γ| in a channel keeps its plain form: β/γ would be too large to be trained.
_LARGEST_SHIFT = 10.0


# ------------------------------------------------------------------------------------------- gated batch-norm


class _Gated(_BatchNorm):
    """Batch-norm whose `weight` is the gate φ and whose `bias` is β': (x̂ + β')·φ.

    The parameters are those of the plain batch-norm, with other values: optimizer, graph and surgery need not know.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        tracks = self.training and self.track_running_stats
        momentum = self.momentum
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a plain mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        remembers = tracks or not self.training
        return F.batch_norm(
            x,
            self.running_mean if remembers else None,
            self.running_var if remembers else None,
            self.weight,
            self.bias * self.weight,
            self.training or self.running_mean is None,
            momentum or 0.0,
            self.eps,
        )


class GatedBatchNorm1d(_Gated, nn.BatchNorm1d):
    """`nn.BatchNorm1d` in gated form."""


class GatedBatchNorm2d(_Gated, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in gated form."""


class GatedBatchNorm3d(_Gated, nn.BatchNorm3d):
    """`nn.BatchNorm3d` in gated form."""


_GATED: dict[type, type] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
    nn.BatchNorm3d: GatedBatchNorm3d,
}
_PLAIN = {gated: plain for plain, gated in _GATED.items()}


@torch.no_grad()
def gate(model: nn.Module) -> list[str]:
    """Bring every batch-norm of a model into gated form; what the model computes stays the same.

    A batch-norm stays as it is where it has no weights of its own (not affine, frozen, tied, half precision), is
    of another class (a synchronised or a user's own one), or has a channel with |β| > 10 |γ|.

    Returns:
        The names of the gated ones.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[id(p)] = users.get(id(p), 0) + 1
    gated = []
    for name, module in model.named_modules():
        if type(module) not in _GATED or module.weight is None or module.bias is None:
            continue
        scale, shift = module.weight, module.bias
        own = all(p.requires_grad and users[id(p)] == 1 for p in (scale, shift))
        if not own or scale.dtype not in (torch.float32, torch.float64):
            continue
        large = int(shift.abs().gt(_LARGEST_SHIFT * scale.abs()).sum())
        if large:
            logger.info(
                "%s gets no gates: in %d channels its bias is over %g times its scale",
                name,
                large,
                _LARGEST_SHIFT,
            )
            continue
        # β'·φ then rounds to β or to its neighbour; no other β' comes closer
        shift.copy_(torch.where(scale == 0, 0.0, shift / scale))
        gated.append(name)
    as_gated(model, gated)
    return gated


def as_gated(model: nn.Module, names: Iterable[str]) -> None:
    """Give these plain batch-norms the gated class. Their values stay: they are, or will be loaded as, φ and β'."""
    for name in names:
        module = model.get_submodule(name)
        module.__class__ = _GATED[type(module)]


@torch.no_grad()
def fold(model: nn.Module) -> list[str]:
    """Bring every gated batch-norm back into its plain class; what the model computes stays the same.

    Returns:
        The names of those that were gated.
    """
    folded = []
    for name, module in model.named_modules():
        if isinstance(module, _Gated):
            module.bias.mul_(module.weight)
            module.__class__ = _PLAIN[type(module)]
            folded.append(name)
    return folded


# -------------------------------------------------------------------------------------------------- all gates


class Gates:
    """All gates of a model, one after the other, and dense arithmetic over them.

    Args:
        structures: the current structures.
        original: layer group → its width in the original model.
        gated: names of the gated batch-norms.
        parameters: by name.
    """

    def __init__(
        self,
        structures: StructureSet,
        original: Mapping[str, int],
        gated: Iterable[str],
        parameters: Mapping[str, Tensor],
    ) -> None:
        known = frozenset(gated)
        #: layer group → gates of each of its structures; a group without any is absent
        self.joined: dict[str, int] = {}
        first, offset = 0, {}
        for name, width in original.items():
            offset[name], first = first, first + width
        # A layer's gates, by the weights that they multiply → the structure of each, counted through the original
        # model, or -1. One layer can have gates of several layer groups (behind a concatenation).
        layers: dict[tuple[Place, ...], Tensor] = {}
        for name, group in structures.groups.items():
            couplings = with_role(group, Role.SCALE) or with_role(group, Role.ROW)
            if couplings:
                self.joined[name] = len(couplings)
            for c in couplings:
                parts = _parts(group, c, known)
                owner = layers.setdefault(parts, torch.full((structures.sizes[c.place],), -1))
                owner[c.position] = group.ids[c.owner] + offset[name]

        rows: list[tuple[Place, Tensor]] = []  # (weights, the gate of each row)
        count = 0
        for parts, owner in layers.items():
            rows += [(place, torch.arange(count, count + owner.numel())) for place in parts]
            count += owner.numel()
        rows.sort(key=lambda row: parameters[row[0][0]].ndim > 1)
        #: what the gates multiply: first vectors, then tensors of several dimensions
        self.places = [place for place, _ in rows]
        self.names = list(dict.fromkeys(name for name, _ in self.places))
        self._vectors = sum(parameters[name].ndim == 1 for name, _ in self.places)
        self.device = parameters[self.places[0][0]].device if rows else torch.device("cpu")
        none = torch.zeros(0, dtype=torch.int64)
        self._of_gate = Sums(torch.cat([none, *(gate for _, gate in rows)]), count, self.device)
        self._of_structure = Sums(torch.cat([none, *layers.values()]), first, self.device)

    def moved(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the parameters have gone to another device, so that the index maps must be made anew."""
        return bool(self.places) and parameters[self.places[0][0]].device != self.device

    @torch.no_grad()
    def sums(self, parameters: Mapping[str, Tensor], others: Mapping[str, Tensor | None]) -> Tensor:
        """|Σ w·v| of each gate, added up over the gates of each structure: with gradients for v, Σ |φ·∂L/∂φ|.

        Args:
            parameters: the weights w, by name.
            others: v, by name; an absent one counts as zero.

        Returns:
            One value per structure of the original model, in the order of its layer groups, at least float32.
        """
        pairs = []
        for name, _ in self.places:
            weight, other = parameters[name], others[name]
            other = torch.zeros_like(weight) if other is None else other
            pairs.append((weight.to(self.device), other.to(self.device)))
        products = [torch.zeros(0, device=self.device)]
        if self._vectors:
            weights, values = (torch.cat(each) for each in zip(*pairs[: self._vectors], strict=True))
            products.append(_wide(weights) * _wide(values))
        for (_, dim), (weight, other) in zip(
            self.places[self._vectors :], pairs[self._vectors :], strict=True
        ):
            rest = [d for d in range(weight.ndim) if d != dim]
            products.append((_wide(weight) * _wide(other)).sum(rest))
        return self._of_structure(self._of_gate(torch.cat(products)).abs())


def with_role(group: LayerGroup, role: Role) -> list[Coupling]:
    """The couplings of a layer group that have this role."""
    return [c for c in group.couplings if c.role is role]


def _parts(group: LayerGroup, coupling: Coupling, gated: frozenset[str]) -> tuple[Place, ...]:
    """The weights that the gates of one layer multiply."""
    module = coupling.tensor.rpartition(".")[0]
    if module in gated:
        return (coupling.place,)
    partners = [
        c.place
        for c in with_role(group, Role.SHIFT if coupling.role is Role.SCALE else Role.BIAS)
        if c.tensor.rpartition(".")[0] == module and torch.equal(c.position, coupling.position)
    ]
    return coupling.place, *partners


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
