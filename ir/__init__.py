"""The nouns: sites found in a graph, the dynamic-k block, its one op, and costs."""

from .block import DynkFFN, Router
from .op import ACTIVATIONS, dynk_ffn, reference, select
from .site import FFNSite, Miss

__all__ = [
    "ACTIVATIONS",
    "DynkFFN",
    "FFNSite",
    "Miss",
    "Router",
    "dynk_ffn",
    "reference",
    "select",
]
