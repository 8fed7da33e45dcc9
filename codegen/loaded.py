"""What loaded artefacts have in common: names, a knob, and an archive that holds its own index."""

import json
import math
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import MALFORMED, ArtefactError
from .exported import tensors_of

INDEX = "skimp/index.json"  # not under extra/, which torch reads as text


class Loaded:
    """An artefact in memory.

    Attributes:
        inputs, outputs: Names, in order.
        taus: The name in the artefact of each block's threshold, by block.
        gates: The blocks whose gate is their router.
    """

    inputs: list[str]
    outputs: list[str]
    taus: dict[str, str]
    gates: Collection[str] = ()

    def told(self, index: Mapping[str, Any]) -> None:
        """Take the names from :meth:`skimp.codegen.exported.Program.index`."""
        self.inputs, self.outputs, self.taus = index["inputs"], index["outputs"], index["taus"]
        self.gates = index.get("gates", ())

    def run(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """From inputs by name, of which it may not need all, to the outputs, in order."""
        raise NotImplementedError

    def turn(self, thresholds: Mapping[str, Tensor]) -> None:
        """Set thresholds, 0-d float32, by their names in the artefact."""
        raise NotImplementedError

    def __call__(self, **kwargs: Any) -> dict[str, Tensor]:
        """Call it like the model; outputs by name."""
        given = tensors_of(kwargs)
        if lacking := [n for n in self.inputs if n not in given]:
            raise ValueError(f"{', '.join(lacking)} missing; it takes {', '.join(self.inputs)}")
        return dict(zip(self.outputs, self.run(given), strict=True))

    def set_tau(self, tau: float | Mapping[str, float]) -> None:
        """Turn the knob: one threshold in ``[0, 1]``, or one per block by name.

        Of a block whose gate is its router, any that is not negative.

        Raises:
            ValueError: A threshold out of range, or an unknown block.
        """
        values = dict(tau) if isinstance(tau, Mapping) else dict.fromkeys(self.taus, float(tau))
        for name, value in values.items():
            if name not in self.taus:
                raise ValueError(f"no block is named {name!r}; there are {', '.join(self.taus)}")
            most = math.inf if name in self.gates else 1
            if not 0 <= value <= most:
                raise ValueError(f"tau {value} of {name} is outside [0, {most}]")
        self.turn({self.taus[n]: torch.tensor(float(v)) for n, v in values.items()})


def append(path: Path, index: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
    """Add an index to an archive, and other files beside it."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        first = archive.namelist()[0]
        root = f"{first.split('/')[0]}/" if "/" in first else ""
        for name, data in (files or {}).items():
            archive.writestr(root + name, data)
        archive.writestr(root + INDEX, json.dumps(index, indent=1))


def read(path: Path, version: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The index of an archive that is whole, and the files beside it.

    Raises:
        ArtefactError: It is damaged, truncated or foreign, or of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            ours = {
                n[n.index("skimp/") :]: n
                for n in archive.namelist()
                if n.startswith("skimp/") or "/skimp/" in n
            }
            if INDEX not in ours:
                raise ArtefactError(f"{path} holds no {INDEX}: it was not written by skimp.export")
            index = json.loads(archive.read(ours[INDEX]))
            if index.get("version") != version:
                raise ArtefactError(
                    f"{path} has version {index.get('version')}; this skimp reads {version}"
                )
            files = {name: archive.read(full) for name, full in ours.items()}
            if bad := archive.testzip():
                raise ArtefactError(f"{path} is damaged at {bad}; export the model again")
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} does not exist") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, *MALFORMED) as error:
        raise ArtefactError(f"{path} is damaged or truncated ({error}); export it again") from error
    return index, files
