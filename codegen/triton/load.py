"""Import generated text: Triton reads a kernel's source from the file it was defined in."""

import functools
import hashlib
import importlib.util
import os
from types import ModuleType

from ...ir.cost import cache_dir, write_atomically
from ...ir.errors import CompileError


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def load(source: str, name: str) -> ModuleType:
    """The module of a text, written to the cache under the digest of its content.

    Args:
        source: What :func:`skimp.codegen.triton.emit.emit` returns.
        name: For people.

    Raises:
        CompileError: Triton is not installed, or the cache cannot be written.
    """
    if importlib.util.find_spec("triton") is None:
        raise CompileError(
            "Triton is not installed (pip install 'skimp[gpu]'). Until then the op runs its plain "
            "reference on GPUs."
        )
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = cache_dir() / "triton" / f"{name}_{digest}.py"
    try:
        # compared and not trusted: a damaged file must not become a kernel
        if not path.exists() or path.read_text() != source:
            write_atomically(path, source.encode())
    except OSError as error:
        raise CompileError(
            f"the kernel cache {path.parent} cannot be written ({error.strerror or error}); free "
            "some space, or point SKIMP_CACHE at another folder"
        ) from error
    found = importlib.util.spec_from_file_location(f"skimp_triton_{name}_{digest}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
