"""What tuning found, kept between processes: which kernels and tiles are best, by device."""

import functools
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ...ir.cost import cache_dir, write_atomically
from .spec import Tiles, TritonSpec

_found: dict[tuple[str, str], tuple[str, Tiles]] = {}
_read: set[str] = set()


def recall(spec: TritonSpec, case: str, device: torch.device) -> tuple[str, Tiles] | None:
    """The plan and tiles that tuning found for a spec and a class of shapes, or ``None``."""
    key = device_key(device)
    _read_file(key)
    return _found.get((key, f"{spec.name}/{case}"))


def _read_file(key: str) -> None:
    if key not in _read:
        _read.add(key)
        for name, (plan, tiles) in _load(_path(key)).items():
            _found.setdefault((key, name), (plan, Tiles(**tiles)))


def remember(
    spec: TritonSpec, case: str, device: torch.device, plan: str, tiles: Tiles, *, write: bool
) -> None:
    """Use a plan and tiles from now on and, with ``write``, in later processes too.

    Raises:
        ArtefactError: The cache cannot be written.
    """
    key = device_key(device)
    recall(spec, case, device)  # what earlier processes found, first
    _found[key, f"{spec.name}/{case}"] = (plan, tiles)
    if not write:
        return
    path = _path(key)
    ours = {n: (p, asdict(t)) for (k, n), (p, t) in _found.items() if k == key}
    write_atomically(path, json.dumps(_load(path) | ours, indent=1).encode())


def state() -> str:
    """Everything that is known of the devices here, as text: part of what compiled code holds."""
    if torch.cuda.is_available():
        _read_file(device_key(torch.device("cuda")))
    return repr(sorted(_found.items()))


def forget() -> None:
    """Go back to the untuned defaults in this process."""
    _found.clear()
    # files already read stay unread: a later tuning merges with them when it writes


@functools.cache
def device_key(device: torch.device) -> str:
    """Tiles are good for one kind of device and one compiler."""
    import triton

    there = device.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name(device) if there else device.type
    return f"{name} triton-{triton.__version__}".replace(" ", "-").replace("/", "-")


def _path(key: str) -> Path:
    return cache_dir() / "triton" / f"tuned-{key}.json"


def _load(path: Path) -> dict[str, tuple[str, dict[str, int]]]:
    """What a file holds; a damaged one holds nothing, since it can be measured again."""
    try:
        held = json.loads(path.read_text())
        return {str(n): (str(p), {str(k): int(v) for k, v in t.items()})
                for n, (p, t) in held.items()}  # fmt: skip
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
