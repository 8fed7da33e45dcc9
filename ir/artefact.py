"""Blocks on disk: a folder with ``skimp.json`` and one file of weights.

The JSON names the weights file by its contents and is written last, by renaming, so a reader finds
either the old artefact or the new one. The names are skimp's own: a library that does not know
them finds no model here, rather than one that runs as something else.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .block import DynkFFN, Projection, Router, make_router
from .cost import DRAFT, sweep, write_atomically
from .errors import MALFORMED, ArtefactError, no_room, unwritable

VERSION = 1
INDEX = "skimp.json"


def write(folder: Path, model: nn.Module, record: dict[str, Any]) -> None:
    """Write a converted model.

    Args:
        folder: Made if it does not exist; an artefact in it is replaced at the very end.
        model: A model with blocks.
        record: JSON-serialisable; kept beside the blocks.

    Raises:
        ArtefactError: The folder cannot be written, for example on a full disk.
    """
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault(tensor.data_ptr(), name)
        if first != name and tensor.numel() and tensors[first].shape == tensor.shape:
            aliases[name] = first
        else:
            tensors[name] = tensor.detach().contiguous()
    index = {
        "format": "skimp",
        "version": VERSION,
        "aliases": aliases,
        "blocks": {
            name: dict(
                act=b.act,
                expert_size=b.expert_size,
                router_width=b.router.width,
                dense=b.dense,
                linear=b.linear,
                predicts=b.router.predicts,
                top=b.router.top,
            )
            for name, b in model.named_modules()
            if isinstance(b, DynkFFN)
        },
        "linears": [n for n, p in model.named_modules() if isinstance(p, Projection)],
        "record": record,
    }
    with drafts(folder / INDEX) as part:
        index["sha256"] = digest = _write_weights(part, tensors)
        index["weights"] = _named(digest)
        write_atomically(part / INDEX, json.dumps(index, indent=1).encode())
        take_place(part, folder)


def take_place(part: Path, folder: Path) -> None:
    """Let one artefact take the place of another.

    Args:
        part: What :func:`write` wrote, on the file system of the other; it is moved.
        folder: Of the other, if there is one.

    Raises:
        UnwritableError: The folder cannot be written.
    """
    weights = str(read_index(part)["weights"])
    with alone(folder):  # else one process removes the weights that another is about to name
        for name in (weights, INDEX):
            os.replace(part / name, folder / name)
        for old in folder.glob("weights-*.safetensors"):
            if old.name != weights:
                old.unlink(missing_ok=True)


def _write_weights(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors from where they lie, and name the file by its SHA-256, which is returned."""
    from safetensors.torch import save_file

    draft, ours = folder / "weights", folder / "ours"
    save_file(tensors, draft, metadata={"format": "skimp"})
    ours.touch()
    draft.chmod(ours.stat().st_mode)  # readable by whom the umask says, unlike safetensors'
    with draft.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    os.replace(draft, folder / _named(digest))
    return digest


def _named(digest: str) -> str:
    return f"weights-{digest[:16]}.safetensors"


@contextmanager
def alone(folder: Path, doing: str = "") -> Iterator[None]:
    """Hold the lock of a folder, which a process loses however it ends.

    Args:
        folder: Made if need be.
        doing: What would take long to wait for; it is refused instead.

    Raises:
        ArtefactError: Another process does that, or the folder cannot be written.
    """
    # two locks: what takes long also writes, and must not wait for itself
    lock = folder / ".lock" if doing else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT if doing else os.O_RDONLY, 0o644)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if doing else 0))
            except BlockingIOError as error:
                raise ArtefactError(
                    f"another process is {doing} {folder}; wait for it, or choose another folder"
                ) from error
            except OSError:
                pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@contextmanager
def drafts(path: Path) -> Iterator[Path]:
    """A folder beside a path for what shall replace it once it is complete.

    Raises:
        UnwritableError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with tempfile.TemporaryDirectory(prefix=f"{DRAFT}{path.name}.", dir=path.parent) as scratch:
            yield Path(scratch)
    except Exception as error:
        if isinstance(error, OSError) or no_room(error):
            raise unwritable(path, error) from error
        raise


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, whose files go there once all are written.

    The old ``config.json`` goes first and the new one comes last: a reader finds the old model, the
    new one, or for an instant none, but never the configuration of one with weights of the other.

    Raises:
        UnwritableError: It cannot be written.
    """
    with drafts(folder) as part:
        yield part
        with alone(folder):
            (folder / "config.json").unlink(missing_ok=True)
            files = sorted(part.iterdir(), key=lambda p: p.name == "config.json")
            for old in {*folder.glob("*.safetensors*")} - {folder / f.name for f in files}:
                old.unlink()  # shards that would be taken for the new model's
            for file in files:
                os.replace(file, folder / file.name)


def read_index(folder: Path) -> dict[str, Any]:
    """Read and check ``skimp.json``.

    Raises:
        ArtefactError: No artefact, not one of skimp's, or one of a later version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtefactError(f"{folder} holds no {INDEX}, so no converted model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != "skimp":
        raise ArtefactError(f"{path} was not written by skimp")
    if index.get("version") != VERSION:
        raise ArtefactError(
            f"{path} has version {index.get('version')}; this skimp reads version {VERSION}. "
            "Convert the model again, or use the skimp that wrote it."
        )
    return index


def read_into(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights and settings of an artefact into a model with the same blocks.

    Returns:
        The record that was written with it.

    Raises:
        ArtefactError: A damaged artefact, or one of another model.
    """
    index = read_index(folder)
    try:
        return _fill(folder, index, model)
    except (RuntimeError, *MALFORMED) as error:  # torch's, of sizes that no tensor has
        what = f"{type(error).__name__}: {error}"
        raise ArtefactError(f"{folder / INDEX} is not as skimp writes it ({what})") from error


def _fill(folder: Path, index: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / Path(str(index["weights"])).name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    if digest != index["sha256"]:
        raise ArtefactError(f"{path} is damaged or truncated; convert the model again")
    try:
        state = load_file(path)  # mapped, not read
    except SafetensorError as error:
        raise ArtefactError(f"{path} is not a safetensors file: {error}") from error
    state |= {name: state[first] for name, first in index["aliases"].items()}
    found = {n: b for n, b in model.named_modules() if isinstance(b, DynkFFN | Projection)}
    held = {*index["blocks"], *index.get("linears", ())}
    if set(found) != held:
        raise ArtefactError(
            f"{folder} holds blocks {sorted(held)[:3]}.., the model has "
            f"{sorted(found)[:3]}..: it was converted from another architecture"
        )
    for name, settings in index["blocks"].items():
        block = found[name]
        if isinstance(block, Projection):
            block = _in_place_of(block, name, state, settings)
            model.set_submodule(name, block)
        block.act, block.dense = str(settings["act"]), bool(settings["dense"])
        block.expert_size = int(settings["expert_size"])
        width, experts = int(settings["router_width"]), block.experts
        same = isinstance(block.router, Router) and block.router.up.weight.shape == (experts, width)
        if not same:
            block.router = make_router(block.d, width, experts).to(block.w_in.dtype)
        block.router.predicts = str(settings.get("predicts", "norms"))
        block.router.top = int(settings.get("top", 0))
    try:
        with torch.no_grad():
            model.load_state_dict(state)
    except RuntimeError as error:
        raise ArtefactError(f"{folder} does not fit the model: {error}") from error
    return dict(index["record"])


def _in_place_of(
    linear: Projection, name: str, state: dict[str, Tensor], settings: dict[str, Any]
) -> DynkFFN:
    """The block that had taken the place of a linear layer, its weights still to be loaded."""
    w_in, b_in, w_out, b_out = (
        torch.zeros_like(state[f"{name}.{k}"]) for k in ("w_in", "b_in", "w_out", "b_out")
    )
    return DynkFFN(
        w_in,
        b_in,
        None,
        None,
        w_out,
        b_out,
        expert_size=int(settings["expert_size"]),
        act=str(settings["act"]),
        router_width=int(settings["router_width"]),
        linear=True,
    ).to(linear.weight.dtype)
