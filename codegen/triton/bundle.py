"""Kernels compiled ahead of time in one file: binaries, and a manifest that vouches for them."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...ir.cost import write_atomically
from ...ir.errors import ArtefactError
from .aot import Compiled, compile_all
from .spec import TritonSpec

VERSION = 2


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a file holds.

    Attributes:
        target: For which device.
        manifest: As it was written: version, target, Triton's version, specs, kernels with their
            launch data and digests.
        binaries: Cubins or hsacos by their digest.
    """

    target: str
    manifest: dict[str, Any]
    binaries: dict[str, bytes]


def write(path: Path, blocks: Iterable[tuple[TritonSpec, int]], target: str) -> list[Compiled]:
    """Compile every kernel of some blocks for a target into one file, whole or not at all.

    Args:
        path: Of the file.
        blocks: What :func:`skimp.codegen.triton.aot.spec_of` says of each, and the width of its
            router.
        target: One of :data:`skimp.codegen.triton.aot.TARGETS`.

    Raises:
        CompileError: See :func:`skimp.codegen.triton.aot.compile_kernel`.
        ArtefactError: The file cannot be written.
    """
    import triton

    found: dict[tuple[TritonSpec, str], Compiled] = {}  # widths of routers share most kernels
    for spec, width in blocks:
        found |= {(spec, c.kernel.name): c for c in compile_all(spec, target, width)}
    binaries = {hashlib.sha256(c.binary).hexdigest(): c.binary for c in found.values()}
    entries = [
        c.line() | asdict(c.kernel)
        | {"spec": c.spec.name, "sha256": hashlib.sha256(c.binary).hexdigest()}
        for c in found.values()
    ]  # fmt: skip
    specs = {c.spec.name: asdict(c.spec) for c in found.values()}
    manifest = {
        "version": VERSION, "target": target, "triton": triton.__version__,
        "specs": specs, "kernels": entries,
    }  # fmt: skip
    text = json.dumps(manifest, indent=1)
    vouched = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()})
    content: dict[str, str | bytes] = {"manifest.json": text, "digest.json": vouched, **binaries}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as held:
        for name, data in content.items():
            # a fixed date, so that equal kernels make equal files
            held.writestr(zipfile.ZipInfo(name), data)
    write_atomically(path, buffer.getvalue())
    return list(found.values())


def read(path: Path) -> Bundle:
    """Read a bundle and check every byte that would run.

    Digests show damage. They are no signature: take bundles from whom you would take code.

    Raises:
        ArtefactError: The file is missing, truncated, changed or of another version.
    """
    try:
        with zipfile.ZipFile(path) as held:
            text = held.read("manifest.json")
            vouched = json.loads(held.read("digest.json"))["sha256"]
            if hashlib.sha256(text).hexdigest() != vouched:
                raise ArtefactError(f"the manifest of {path} was changed; build it again")
            manifest = json.loads(text)
            if manifest.get("version") != VERSION:
                raise ArtefactError(
                    f"{path} has version {manifest.get('version')}, this skimp reads {VERSION}; "
                    "build it again with skimp aot"
                )
            binaries = {k["sha256"]: held.read(k["sha256"]) for k in manifest["kernels"]}
            if sorted(held.namelist()) != sorted(["manifest.json", "digest.json", *binaries]):
                raise ArtefactError(f"{path} holds files that it should not; build it again")
    except ArtefactError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError,
            KeyError, TypeError, ValueError) as error:  # fmt: skip
        raise ArtefactError(f"{path} is no whole bundle ({error}); build it again") from error
    for digest, data in binaries.items():
        if hashlib.sha256(data).hexdigest() != digest:
            raise ArtefactError(f"a kernel in {path} was changed; build the bundle again")
    return Bundle(str(manifest["target"]), manifest, binaries)
