"""Names: what a layer is called in the words of the user."""

from __future__ import annotations


def owner_of(tensor: str) -> str:
    """The layer that a parameter belongs to, also where it is behind a parametrization."""
    head, _, leaf = tensor.rpartition(".")
    head = head.split("parametrizations.")[0].rstrip(".")
    plain = leaf.startswith(
        ("weight", "bias", "in_proj", "original", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    )
    return head if plain and head else tensor
