"""Compile C++ on first use into a cache that is addressed by content.

A library is compiled under a temporary name and renamed, so processes that compile the same one at
once both succeed, and a killed one leaves nothing that is ever loaded. A digest at the end of the
file tells a damaged library, which is compiled again.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from ...ir.cost import cache_dir
from ...ir.errors import CompileError

_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
          "-fopenmp", "-fPIC", "-shared",
          # a library calls its own functions, though one of a package in this process, whose
          # functions all see, has some of the same name
          "-Wl,-Bsymbolic")  # fmt: skip
_STALE_SECONDS = 3600.0


def compiler() -> tuple[str, ...]:
    """The C++ compiler: ``$CXX``, or ``g++``, ``c++`` or ``clang++`` on the path.

    Raises:
        CompileError: There is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "c++", "clang++"]:
        if name and (path := shutil.which(name.split()[0])):
            return (path, *name.split()[1:])
    raise CompileError(
        f"no C++ compiler: {named or 'g++, c++ and clang++'} cannot be found. Install g++ (on "
        "Debian: apt install g++) or set CXX. Until then the op runs its plain reference."
    )


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    got = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return got.stdout.partition("\n")[0]


def build(source: str, name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Load a library, compiling it if the cache does not hold it.

    Args:
        source: C++.
        name: Of the library, for people.
        flags: More compiler flags.

    Raises:
        CompileError: No compiler, a failed compile, or a cache that cannot be written.
    """
    command = compiler()
    key = "\0".join([source, *_FLAGS, *flags, *command, _version(command)])
    folder = cache_dir() / "kernels"
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not _intact(path):
        _compile(source, path, [*command, *_FLAGS], flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"{path} cannot be loaded: {error}") from error


def _intact(path: Path) -> bool:
    """Whether a library ends with the digest of what precedes it."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > 32 and hashlib.sha256(data[:-32]).digest() == data[-32:]


def _compile(source: str, path: Path, command: list[str], flags: tuple[str, ...]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as scratch:
            text, library = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
            text.write_text(source)
            got = subprocess.run(
                [
                    *command,
                    str(text),
                    "-o",
                    str(library),
                    *flags,
                ],  # libraries come after what needs them
                capture_output=True,
                text=True,
                check=False,
            )
            if got.returncode:
                raise CompileError(_explain(got.stderr, command))
            with library.open("ab") as file:  # a loader ignores what follows the sections
                file.write(hashlib.sha256(library.read_bytes()).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(library, path)
    except OSError as error:
        raise CompileError(
            f"the kernel cache {path.parent} cannot be written ({error.strerror or error}); free "
            "some space, or point SKIMP_CACHE at another folder"
        ) from error


def _explain(stderr: str, command: list[str]) -> str:
    if "No space left" in stderr or "File size limit" in stderr or "file size" in stderr.lower():
        return (
            "the compiler ran out of disk space; free some, or point SKIMP_CACHE and TMPDIR at "
            f"another folder\n{stderr.strip()[-500:]}"
        )
    first = next((x for x in stderr.splitlines() if "error" in x), stderr.strip()[:300])
    return (
        f"{command[0]} could not compile a kernel: {first or 'it gave no message'}\n"
        f"command: {' '.join(command)}\nSet CXX to another compiler (gcc 9 or later)."
    )


def _sweep(folder: Path) -> None:
    """Remove what compiles killed long ago left behind."""
    for scratch in folder.glob(".build-*"):
        try:
            if time.time() - scratch.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError:
            continue
