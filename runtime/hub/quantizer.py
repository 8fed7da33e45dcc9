"""What transformers calls while it loads a converted folder: a quantization config, a quantizer.

``config.json`` describes every block; the quantizer swaps empty blocks into the model before its
weights are read. Two things make the folder fail without skimp, where transformers would only warn
of an unknown quantization and go on with random networks: ``transformers_weights`` in the config
holds a sentence instead of a file name, and one dense weight of every block is stored with no
values, which does not fit a dense model. The second also guards what ``save_pretrained`` wrote.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...ir.block import DynkFFN
from ...ir.errors import ArtefactError
from ...ir.site import FFNSite, ProjectionSite
from ...passes.graft import swap
from ...passes.lift import blocks
from ...passes.place import Place

METHOD = "skimp"
VERSION = 1
NEEDED = "this converted model needs skimp: `pip install skimp`, and `import skimp` before loading"


class SkimpConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The blocks of a converted model, as kept in its ``config.json``.

    Args:
        blocks: By the name that a block has in the model, see :func:`describe`.
        version: Of this description.
        inputs: Shapes and dtypes of one call.
        pipeline: The passes that made it.

    Raises:
        ArtefactError: Written by a later skimp.
    """

    def __init__(
        self,
        blocks: dict[str, Any],
        version: int = VERSION,
        inputs: dict[str, Any] | None = None,
        pipeline: str = "",
        **_: Any,
    ) -> None:
        if version != VERSION:
            raise ArtefactError(
                f"the model's quantization_config has version {version}; this skimp reads version "
                f"{VERSION}. Convert the model again, or use the skimp that wrote it."
            )
        self.quant_method = METHOD
        self.version = version
        self.blocks = blocks
        self.inputs = inputs or {}
        self.pipeline = pipeline


def describe(block: DynkFFN, site: FFNSite | ProjectionSite, place: Place) -> dict[str, Any]:
    """A block in JSON: enough to make it empty, and to make it dense again."""
    return {
        "d_ff": block.d_ff,
        "gated": block.gated,
        "linear": block.linear,
        "expert_size": block.expert_size,
        "act": block.act,
        "router_width": block.router.width,
        "dense": block.dense,
        "predicts": block.router.predicts,
        "top": block.router.top,
        "biases": [n for n in ("b_in", "b_gate", "b_out") if getattr(block, n) is not None],
        "site": asdict(site),
        "place": asdict(place),
    }


def empty_block(spec: Mapping[str, Any], dtype: torch.dtype | None) -> DynkFFN:
    """A block of a description, on the meta device."""
    d, d_ff, d_out = int(spec["site"]["d"]), int(spec["d_ff"]), int(spec["site"]["d_out"])

    def bias(name: str, size: int) -> Tensor | None:
        return torch.empty(size, device="meta") if name in spec["biases"] else None

    def weight(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, device="meta")

    block = DynkFFN(
        weight(d_ff, d),
        bias("b_in", d_ff),
        weight(d_ff, d) if spec["gated"] else None,
        bias("b_gate", d_ff),
        weight(d_ff, d_out),
        bias("b_out", d_out),
        expert_size=int(spec["expert_size"]),
        act=str(spec["act"]),
        router_width=int(spec["router_width"]),
        linear=bool(spec["linear"]),
    )
    block.dense = bool(spec["dense"])
    block.router.predicts = str(spec.get("predicts", "norms"))
    block.router.top = int(spec.get("top", 0))
    return block.to("meta", dtype).eval()


def place_of(spec: Mapping[str, Any], model: nn.Module) -> Place:
    """The place that a description tells, in a model with a head or without."""
    fields = dict(spec["place"])
    added, dropped = _added(model, fields["paths"][0]), _dropped(model, fields["paths"][0])
    paths = tuple(added + p.removeprefix(dropped) for p in fields["paths"])
    return Place(**fields | {"paths": paths})


class SkimpQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swap blocks into a model between its construction and the loading of its weights."""

    requires_calibration = True  # of a dense model nothing is made on the fly

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that a quantizer sees of the config: take the sentence out of the way."""
        if getattr(config, "transformers_weights", None) == NEEDED:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, **_: Any
    ) -> nn.Module:
        for spec in self.quantization_config.blocks.values():
            swap(model, place_of(spec, model), empty_block(spec, dtype))
        silenced = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = silenced | {  # type: ignore[assignment]
            rf"(^|\.){weight.replace('.', chr(92) + '.')}$" for weight in self._guards()
        }
        return model

    def _guards(self) -> list[str]:
        sites = [s["site"] for s in self.quantization_config.blocks.values()]
        return sorted({s["weight"] if "weight" in s else s["w_out"] for s in sites})

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the model's weights, and what a dense model refuses."""
        sites = self.quantization_config.blocks.values()
        prefix = _added(model, sites and next(iter(sites))["place"]["paths"][0])
        dtype = next(model.parameters()).dtype
        guards = {prefix + name: torch.zeros(0, dtype=dtype) for name in self._guards()}
        return {**model.state_dict(), **guards}, {}

    def is_serializable(self) -> bool:
        """``save_pretrained`` and ``push_to_hub`` work."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Blocks have gradients."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Blocks compile."""
        return True


def _added(model: nn.Module, path: str) -> str:
    """What a model with a head puts before the names of the bare one that was converted."""
    names = {name for name, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return prefix if path not in names and prefix + path in names else ""


def _dropped(model: nn.Module, path: str) -> str:
    """The same of a bare model and the names of one with a head."""
    names = {name for name, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return prefix if path not in names and path.removeprefix(prefix) in names else ""


def attach(model: nn.Module, config: SkimpConfig) -> None:
    """Make transformers know an already swapped model as one of ours."""
    model.hf_quantizer = SkimpQuantizer(config)
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = METHOD  # type: ignore[assignment]


def register() -> None:
    """Register both, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(SkimpConfig)
        register_quantizer(METHOD)(SkimpQuantizer)


register()


__all__ = [
    "NEEDED",
    "SkimpConfig",
    "SkimpQuantizer",
    "attach",
    "blocks",
    "describe",
    "register",
]
