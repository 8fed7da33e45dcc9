"""Write a converted model as a Hugging Face folder, and make one dense again."""

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...ir.artefact import written_whole
from ...ir.errors import ArtefactError, SkimpError, VerificationError
from ...ir.site import FFNSite
from ...ir.text import BlockLine
from ...passes.base import first_tensor
from ...passes.budget import set_tau
from ...passes.convert import Converted
from ...passes.graft import TOLERANCE, graft, located
from ...passes.lift import blocks
from ..store import example_of, spec_of

_ACTIVATION_FIELD = re.compile(r".*act(ivation)?(_fn|_function)?|feed_forward_proj")


def save_pretrained(
    converted: Converted | GraphModule,
    model: nn.Module,
    folder: str | Path,
    example: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    measured: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Write a folder that ``from_pretrained`` loads after ``import skimp``, with a model card.

    Args:
        converted: What :func:`skimp.convert` or :func:`skimp.load` gave.
        model: The transformers model that was converted; stays as it is.
        folder: Made if need be; replaced when everything is written.
        example: Keyword arguments of one call.
        tokenizer: Or processor; written beside the model.
        measured: What :func:`skimp.runtime.demo.demo` returned, for the card.

    Returns:
        The converted model as modules, with ``generate()`` and all else that ``model`` has.

    Raises:
        NothingToConvertError: A block has no place among the modules; says why.
        VerificationError: The module form does not compute what the graph does.
        ArtefactError: The folder cannot be written.
    """
    from . import quantizer as hf

    if not callable(getattr(model, "save_pretrained", None)) or not hasattr(model, "config"):
        raise SkimpError(
            f"{type(model).__name__} is not a transformers model; skimp.save writes any model"
        )
    gm = converted.model if isinstance(converted, Converted) else converted
    history = converted.history if isinstance(converted, Converted) else []
    tree: Any = graft(gm, model, example)
    names = {id(b): n for n, b in blocks(tree).items()}
    specs: dict[str, Any] = {}
    for name, (site, place) in located(gm).items():
        if name not in blocks(gm):
            continue  # a projection that stayed linear
        at = tree.get_submodule(place.paths[0])
        specs[names[id(at if place.whole else at.block)]] = hf.describe(
            gm.get_submodule(name),  # type: ignore[arg-type]
            site,
            place,
        )
    pipeline = str(gm.meta.get("skimp.pipeline", ""))
    hf.attach(tree, hf.SkimpConfig(specs, inputs=spec_of(example), pipeline=pipeline))
    lines = [str(BlockLine.of(n, b)) for n, b in blocks(tree).items()]
    with written_whole(Path(folder)) as part:
        tree.save_pretrained(part)
        config = json.loads((part / "config.json").read_text())
        config["transformers_weights"] = hf.NEEDED
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        text = _card(name, tree, lines, history, measured)
        (part / "README.md").write_text(text)
    return tree  # type: ignore[no-any-return]


def _card(
    name: str, tree: nn.Module, lines: list[str], history: Any, measured: Mapping[str, Any] | None
) -> str:
    from transformers.models.auto import modeling_auto

    from .card import card

    kind = type(tree).__name__
    for auto, mapping in (
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
    ):
        if any(kind == n or (isinstance(n, tuple) and kind in n) for n in mapping.values()):
            return card(name, auto, lines, history, measured)
    return card(name, kind, lines, history, measured)


def unconvert(folder: str | Path, out: str | Path) -> None:
    """Write a converted folder as a plain dense one: the network that tau = 0 computes.

    Args:
        folder: What :func:`save_pretrained` wrote.
        out: The new folder; needs no skimp to load.

    Raises:
        ArtefactError: ``folder`` holds no converted transformers model, or ``out`` is not writable.
        VerificationError: The architecture cannot say in its config that these networks use ReLU,
            or attention projections were converted.
    """
    import transformers

    from . import install

    install()
    source = Path(folder)
    try:
        written = json.loads((source / "config.json").read_text())
        class_name = str(written["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ArtefactError(f"{source} holds no Hugging Face model: {error!r}") from error
    if written.get("quantization_config", {}).get("quant_method") != "skimp":
        raise ArtefactError(f"{source} was not written by skimp.save_pretrained")
    dense = dense_form(getattr(transformers, class_name).from_pretrained(source))
    with written_whole(Path(out)) as part:
        dense.save_pretrained(part)
        for file in source.iterdir():
            unwanted = file.suffix == ".safetensors" or file.name.startswith(("README", "model."))
            if file.is_file() and not (part / file.name).exists() and not unwanted:
                shutil.copy2(file, part / file.name)


def dense_form(tree: Any) -> Any:
    """The plain dense model of a converted one: the network that tau = 0 computes.

    Args:
        tree: What ``from_pretrained`` made of a folder that :func:`save_pretrained` wrote. Its
            thresholds are left at 0.

    Raises:
        VerificationError: The architecture cannot say in its config that these networks use ReLU,
            or attention projections were converted.
    """
    class_name = type(tree).__name__
    specs = tree.config.quantization_config.blocks
    if any(s["linear"] for s in specs.values()):
        raise VerificationError(
            f"a plain {class_name} cannot be this model: its attention projections were replaced "
            "by networks, which no linear layer equals. Keep the converted folder."
        )
    config = copy.deepcopy(tree.config)
    del config.quantization_config
    changed = _set_activations(config, specs)
    dense = type(tree)(config).to(tree.dtype).eval()
    state = {n: t for n, t in tree.state_dict().items() if n in dense.state_dict()}
    for name, block in blocks(tree).items():
        state |= dense_weights(block, FFNSite(**specs[name]["site"]))
    missing = [n for n in dense.state_dict() if n not in state]
    dense.load_state_dict(state, strict=False)
    example = example_of(tree.config.quantization_config.inputs)
    set_tau(tree, 0.0)
    with torch.no_grad():
        want, got = first_tensor(tree(**example)), first_tensor(dense(**example))
    difference = float((got - want).float().norm() / want.float().norm().clamp_min(1e-30))
    if missing or not difference <= (TOLERANCE if tree.dtype == torch.float32 else 2e-2):
        acts = ", ".join(sorted({str(s["act"]) for s in specs.values()}))
        raise VerificationError(
            f"a plain {class_name} cannot be this model: outputs differ by {difference:.1e}"
            f"{', without ' + missing[0] if missing else ''}. Its feed-forward networks now use "
            f"{acts}; of the config {', '.join(changed) or 'no field'} could be set to that, which "
            "is not enough. Keep the converted folder."
        )
    return dense


def dense_weights(block: Any, site: FFNSite) -> dict[str, Tensor]:
    """The weights of a block under the names and in the layout of the modules it replaced."""
    w_in, w_gate, b_in, b_gate = block.w_in, block.w_gate, block.b_in, block.b_gate
    result: dict[str, Tensor] = {}
    if site.fused is not None:
        first, second = (w_gate, w_in) if site.fused == "gate_up" else (w_in, w_gate)
        w_in, w_gate = torch.cat([first, second]), None
        if b_in is not None:
            b_in = torch.cat([b_gate, b_in] if site.fused == "gate_up" else [b_in, b_gate])
    elif site.w_gate is not None:
        result[site.w_gate] = w_gate.T if site.transposed else w_gate
        if site.b_gate is not None:
            result[site.b_gate] = b_gate
    result[site.w_in] = w_in.T if site.transposed else w_in
    result[site.w_out] = block.w_out if site.transposed else block.w_out.T
    if site.b_in is not None:
        result[site.b_in] = b_in
    if site.b_out is not None:
        result[site.b_out] = block.b_out
    return {name: tensor.detach().contiguous() for name, tensor in result.items()}


def _set_activations(config: Any, specs: Mapping[str, Any]) -> list[str]:
    """Set the fields of a config that name a changed activation; returns their names."""
    from transformers.activations import ACT2FN

    from ...ir.op import ACTIVATIONS

    probe = torch.linspace(-4, 4, 65)

    def is_one(name: Any, act: str) -> bool:
        if not isinstance(name, str) or name not in ACT2FN:
            return False
        return bool(torch.allclose(ACT2FN[name](probe), ACTIVATIONS[act](probe), atol=1e-3))

    changed: list[str] = []
    wanted = {(str(s["site"]["act"]), str(s["act"])) for s in specs.values()}
    for before, after in sorted(wanted):
        if before == after:
            continue
        for part in _parts(config):
            for key, value in list(vars(part).items()):
                if not _ACTIVATION_FIELD.fullmatch(key):
                    continue
                gated = isinstance(value, str) and value.startswith("gated-")
                bare = value.removeprefix("gated-") if gated else value
                # T5 reads "gated-gelu" as the tanh form
                if is_one(bare, before) or (gated and before == "gelu_tanh" and bare == "gelu"):
                    setattr(part, key, f"gated-{after}" if gated else after)
                    changed.append(key)
    return changed


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict") and hasattr(value, "model_type"):
            yield from _parts(value)
