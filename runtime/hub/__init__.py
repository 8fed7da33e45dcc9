"""Converted models as Hugging Face folders.

After ``import skimp``, ``AutoModel.from_pretrained(folder)`` gives a converted model; without it,
the same call fails and says what is missing. transformers is imported by the user, not by skimp:
its quantizers are registered when the module that lists them has been executed.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_LIST = "transformers.quantizers.auto"  # imported by every class that has from_pretrained


def install() -> None:
    """Teach transformers the quantization method ``skimp``: now if it is imported, else then."""
    if _LIST in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenListed) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenListed())


def _register() -> None:
    from . import quantizer  # noqa: F401  # registers as it is imported, or at the end of that


class _WhenListed(MetaPathFinder):
    """Find one module as everybody else does, once, and register after it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LIST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_and_register
        return spec
