"""skimp: a PyTorch compiler that makes each token pay only for the experts it needs.

converted = skimp.convert(model, data)            # sparse experts, routers, thresholds
fast = torch.compile(converted.model, backend="skimp")
skimp.set_tau(converted.model, 0.1)               # quality against latency, at run time
skimp.export(converted.model, inputs, "m.pt2")    # ahead of time, with its kernels inside
skimp.generate(decoder, **inputs)                 # model.generate with token trees, lossless
"""

from typing import TYPE_CHECKING, Any

from .codegen.cpp.kernels import install as _install
from .codegen.triton.kernels import install as _install_cuda
from .ir.errors import SkimpError
from .passes.budget import set_tau
from .passes.convert import Converted, convert, explain, recipe
from .passes.data import batches, embedded_text, hold_out
from .passes.graft import graft
from .runtime.export import export
from .runtime.hub import install as _install_hub
from .runtime.hub.folder import save_pretrained, unconvert
from .runtime.store import load, save

if TYPE_CHECKING:
    from .runtime.tree.generate import TreeDecoder, generate

__version__ = "0.1.0"

_install()  # the op runs a compiled kernel on CPU; the first call of a shape compiles it
_install_cuda()  # the same on CUDA, where Triton compiles it
_install_hub()  # from_pretrained of transformers loads what save_pretrained wrote

__all__ = [
    "Converted",
    "SkimpError",
    "TreeDecoder",
    "batches",
    "convert",
    "embedded_text",
    "explain",
    "export",
    "generate",
    "graft",
    "hold_out",
    "load",
    "recipe",
    "save",
    "save_pretrained",
    "set_tau",
    "unconvert",
]


def __getattr__(name: str) -> Any:
    """Decoding needs transformers, which ``import skimp`` does not wait for."""
    if name not in ("TreeDecoder", "generate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .runtime.tree import generate as module

    return getattr(module, name)
