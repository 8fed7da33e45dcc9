"""Every model family that transformers ships, small: a short config, weights, and inputs.

Nothing here knows a family by name. Configs are shortened by what their fields are called, and
weights stay unwritten memory, since an export never reads them: widths can stay as they are.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch

_LAYERS = re.compile(
    r"(num|n)_\w*layers?|n_layer|\w*(en|de)coder_layers|\w*num_blocks|depth|layers"
)
_LISTS = re.compile(r"\w*(depths?|layers|num_blocks|blocks)")
_EXPERTS = re.compile(r"\w*(num|n)_\w*experts|moe_num_experts|num_experts")
_CHOSEN = re.compile(r"num_experts_per_tok|moe_top_?k|top_k|num_selected_experts|moe_k")
_GROUPS = {"n_group": 1, "topk_group": 1, "num_expert_group": 1}
_STAGES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
_MODALITY = {
    "input_ids": "text",
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_values": "audio",
    "input_features": "audio",
    "audio_values": "audio",
}


def families() -> dict[str, str]:
    """Model type to the name of its base class, one model type per class."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kinds: dict[str, str] = {}
    for kind, names in MODEL_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        own = name.lower().startswith(kind.replace("_", "").replace("-", ""))
        if own or name not in kinds:
            kinds[name] = kind
    return {kind: name for name, kind in kinds.items()}


def build(kind: str, name: str) -> Any:
    """A model of a family with two layers and up to four experts; its weights are not written.

    Raises:
        Exception: Whatever transformers raises for a family that no default config builds.
    """
    import transformers
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    model_class = getattr(transformers, name)
    whole = config_class()
    error: Exception | None = None
    for make in (lambda: config_class.from_dict(shorten(whole.to_dict())), lambda: whole):
        try:
            config = make()
            config._attn_implementation = "eager"
            with no_init_weights():
                return model_class(config).eval()
        except Exception as e:
            error = error or e
    assert error is not None
    raise error


def shorten(fields: dict[str, Any]) -> dict[str, Any]:
    """Two layers per stack, four experts of which two run; lists of layers follow."""
    cut = {v for k, v in fields.items() if type(v) is int and v > 2 and _LAYERS.fullmatch(str(k))}
    result: dict[str, Any] = {}
    for key, value in fields.items():
        if key in _STAGES or not isinstance(key, str):
            continue
        if isinstance(value, dict):
            value = shorten(value) if all(isinstance(k, str) for k in value) else value
        elif isinstance(value, bool):
            pass
        elif isinstance(value, int):
            if _LAYERS.fullmatch(key) or _CHOSEN.fullmatch(key):
                value = min(value, 2)
            elif _EXPERTS.fullmatch(key):
                value = min(value, 4)
            elif key in _GROUPS:
                value = _GROUPS[key]
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            if len(value) in cut and len(value) > 4 and not _LISTS.fullmatch(key):
                value = value[:2]
            elif _LISTS.fullmatch(key):
                value = [min(v, 2) for v in value]
        elif isinstance(value, list) and len(value) in cut:
            value = value[:2]
        result[key] = value
    return result


def inputs(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the model may be called with, likeliest first, each with its modality."""
    for modality, batch in _inputs(model):
        yield modality, batch | _required(model, batch)


def _required(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Arguments without a default that a batch lacks, made like what it holds."""
    tensors = [v for v in batch.values() if isinstance(v, torch.Tensor)]
    made: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in batch or parameter.default is not parameter.empty or not tensors:
            continue
        if name.endswith("input_ids"):
            made[name] = torch.ones(2, 16, dtype=torch.int64)
        elif name.startswith("prompt") and tensors[0].dim() == 4:  # an image and its picture
            made[name] = tensors[0].clone()
        elif name.endswith(("mask", "padding")):
            made[name] = torch.ones(tensors[0].shape[:2], dtype=torch.int64)
    return made


def _inputs(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    names = inspect.signature(model.forward).parameters
    main = model.main_input_name
    modality = _MODALITY.get(main, "other")
    fixed: dict[str, Any] = {}
    if "use_cache" in names:
        fixed["use_cache"] = False
    known = {
        "input_ids": torch.ones(2, 16, dtype=torch.int64),
        "attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "decoder_input_ids": torch.ones(2, 12, dtype=torch.int64),
        "bbox": torch.zeros(2, 16, 4, dtype=torch.int64),
    }
    tokens = {n: v for n, v in known.items() if n in names}
    if main in tokens or modality == "text":
        yield modality, {**tokens, **fixed}
    decoder = {n: v for n, v in tokens.items() if n == "decoder_input_ids"}
    if modality == "audio" or "input_features" in names or "input_values" in names:
        for value in _sounds(model.config, main):
            yield modality, {main: value, **decoder, **fixed}
    for name in ("pixel_values", "pixel_values_videos"):
        if name in names:
            for value in _images(model.config):
                if name == main:
                    yield modality, {name: value, **decoder, **fixed}
                yield modality, {**tokens, name: value, **fixed}
    if main in names and modality == "other":
        yield modality, {main: torch.randn(2, 16, _field(model.config, "hidden_size") or 64)}


def _images(config: Any) -> Iterator[torch.Tensor]:
    size = _field(config, "image_size") or _field(config, "input_size") or 224
    if isinstance(size, dict):
        size = [size.get("height", 224), size.get("width", 224)]
    height, width = (size[-2], size[-1]) if isinstance(size, list | tuple) else (size, size)
    channels = _field(config, "num_channels") or _field(config, "in_channels") or 3
    frames = _field(config, "num_frames") or _field(config, "frames_per_clip")
    if frames:
        yield torch.randn(2, frames, channels, height, width)
    yield torch.randn(2, channels, height, width)
    if not frames:
        yield torch.randn(2, 8, channels, height, width)


def _sounds(config: Any, name: str) -> Iterator[torch.Tensor]:
    bins = (
        _field(config, "num_mel_bins")
        or _field(config, "feature_size")
        or _field(config, "input_feat_per_channel")
        or _field(config, "input_dim")
        or 80
    )
    positions = _field(config, "max_source_positions")
    length = _field(config, "max_length")
    if name == "input_values":
        yield torch.randn(2, 16000)
        yield torch.randn(2, 1, 16000)
        yield torch.randn(2, length if isinstance(length, int) and length > 64 else 128, bins)
    else:
        if positions:
            yield torch.randn(2, bins, 2 * positions)
        yield torch.randn(2, 128, bins)
        yield torch.randn(2, bins, 128)
        yield torch.randn(2, 16000)


def _field(config: Any, name: str) -> Any:
    """A field of a config or of the first of its parts that has it."""
    if getattr(config, name, None) is not None:
        return getattr(config, name)
    for part in vars(config).values():
        if hasattr(part, "to_dict") and (found := _field(part, name)) is not None:
            return found
    return None
