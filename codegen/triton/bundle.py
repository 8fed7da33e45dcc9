"""Kernels compiled ahead of time in one file: binaries, and a manifest that vouches for them."""

import ctypes
import hashlib
import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...ir.cost import write_atomically
from ...ir.errors import ArtefactError, CompileError
from .aot import Compiled, compile_all
from .spec import TritonSpec

VERSION = 1


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


def write(path: Path, specs: list[TritonSpec], target: str) -> list[Compiled]:
    """Compile every kernel of some blocks for a target into one file, whole or not at all.

    Raises:
        CompileError: See :func:`skimp.codegen.triton.aot.compile_kernel`.
        ArtefactError: The file cannot be written.
    """
    import triton

    compiled, entries, binaries = [], [], {}
    for spec in specs:
        for kernel in compile_all(spec, target):
            digest = hashlib.sha256(kernel.binary).hexdigest()
            binaries[digest] = kernel.binary
            compiled.append(kernel)
            entries.append({"spec": spec.name, "sha256": digest, **asdict(kernel.kernel),
                            **kernel.line()})  # fmt: skip
            entries[-1]["name"] = kernel.kernel.name
    manifest = {
        "version": VERSION, "target": target, "triton": triton.__version__,
        "specs": {s.name: asdict(s) for s in specs}, "kernels": entries,
    }  # fmt: skip
    text = json.dumps(manifest, indent=1)
    vouched = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()})
    content: dict[str, str | bytes] = {"manifest.json": text, "digest.json": vouched, **binaries}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as held:
        for name, data in content.items():
            # a fixed date, so that equal kernels make equal files
            held.writestr(zipfile.ZipInfo(name), data)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise ArtefactError(f"{path} cannot be written: {error.strerror or error}") from error
    return compiled


def read(path: Path) -> Bundle:
    """Read a bundle and check every byte that would run.

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
    except ArtefactError:
        raise
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is no whole bundle ({error}); build it again") from error
    for digest, data in binaries.items():
        if hashlib.sha256(data).hexdigest() != digest:
            raise ArtefactError(f"a kernel in {path} was changed; build the bundle again")
    return Bundle(str(manifest["target"]), manifest, binaries)


def functions(bundle: Bundle, driver: Any = None, device: int = 0) -> dict[tuple[str, str], int]:
    """Load a bundle's kernels into the current CUDA context through the driver's interface.

    Args:
        bundle: For an ``sm_`` target.
        driver: ``libcuda``; found if not given.
        device: Number of the device whose context is current.

    Returns:
        Handles to launch, by name of spec and kernel. Arguments are those of the signature that
        are no constants, then two null pointers (Triton's scratch buffers).

    Raises:
        CompileError: No driver, no device, another architecture, or a call that failed.
    """
    if not bundle.target.startswith("sm_"):
        raise CompileError(f"the CUDA driver cannot load kernels for {bundle.target}")
    if driver is None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CompileError(f"no CUDA driver on this machine ({error})") from error

    def call(name: str, *args: Any) -> None:
        code = getattr(driver, name)(*args)
        if code:
            raise CompileError(f"{name} failed with CUDA error {code}")

    call("cuInit", 0)
    handle, part = ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(handle), device)
    arch = "sm_"
    for attribute in (75, 76):  # the major and the minor number of the compute capability
        call("cuDeviceGetAttribute", ctypes.byref(part), attribute, handle)
        arch += str(part.value)
    if arch != bundle.target:
        raise CompileError(
            f"the bundle is for {bundle.target}, device {device} is {arch}; build one with "
            f"skimp aot --target {arch}"
        )
    found = {}
    for kernel in bundle.manifest["kernels"]:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(module), bundle.binaries[kernel["sha256"]])
        call("cuModuleGetFunction", ctypes.byref(function), module, kernel["entry"].encode())
        if kernel["shared"] > 48 << 10:  # more than that is given only when asked for
            call("cuFuncSetAttribute", function, 8, kernel["shared"])
        found[kernel["spec"], kernel["name"]] = int(function.value or 0)
    return found
