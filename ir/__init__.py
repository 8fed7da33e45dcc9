"""The nouns: sites found in a graph, the dynamic-k block, its one op, and costs."""

from .block import DynkFFN, Projection, Router
from .op import ACTIVATIONS, dynk_ffn, reference, select
from .site import FFNSite, Miss, ProjectionSite

__all__ = [
    "ACTIVATIONS",
    "DynkFFN",
    "FFNSite",
    "Miss",
    "Projection",
    "ProjectionSite",
    "Router",
    "dynk_ffn",
    "reference",
    "select",
]
