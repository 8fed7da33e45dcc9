"""Launch the kernels of a bundle through the CUDA driver's interface; Triton need not be there.

Calls, types and constants are those of the CUDA driver API reference (``cuda.h``): sections Device
Management, Module Management and Execution Control.
"""

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import CompileError
from . import launch
from .bundle import Bundle, read
from .spec import TritonSpec

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_UNASKED = 48 << 10  # a launch gets more only after asking for it
_ALIGNED = 16  # what kernels were compiled to trust of every pointer
_DTYPES = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16,
           "*i32": torch.int32}  # fmt: skip


def serve(path: Path) -> Bundle:
    """Let calls on CUDA run the kernels of a bundle from now on, in this process.

    Calls whose block, dtype or arithmetic the bundle was not built for run as before; so does
    everything inside ``torch.compile``, which compiles kernels with its own.

    Args:
        path: A file that ``skimp aot`` wrote.

    Raises:
        ArtefactError: See :func:`skimp.codegen.triton.bundle.read`.
        CompileError: See :class:`Loaded`.
    """
    bundle = read(path)
    loaded = Loaded(bundle, device=torch.cuda.current_device() if torch.cuda.is_available() else 0)
    launch.serve(loaded.modules)
    return bundle


class Loaded:
    """The kernels of a bundle in the current CUDA context.

    Args:
        bundle: For an ``sm_`` target.
        driver: ``libcuda``; found if not given.
        device: Number of the device whose context is current.

    Attributes:
        modules: By spec, what has its kernels as attributes, to launch as generated ones are.

    Raises:
        CompileError: No driver, no device, another architecture, or a call that failed.
    """

    def __init__(self, bundle: Bundle, driver: Any = None, device: int = 0) -> None:
        if not bundle.target.startswith("sm_"):
            raise CompileError(f"the CUDA driver cannot load kernels for {bundle.target}")
        if torch.cuda.is_available():
            torch.cuda.synchronize(device)  # makes the context, which is PyTorch's too
        self._driver = _library() if driver is None else driver
        self.call("cuInit", 0)
        self._check_architecture(bundle.target, device)
        kernels: dict[str, dict[Any, _Function]] = {}
        for entry in bundle.manifest["kernels"]:
            handle = self._load(entry, bundle.binaries[entry["sha256"]])
            key = _key(entry["function"], entry["constants"])
            kernels.setdefault(entry["spec"], {})[key] = _Function(self, entry, handle)
        specs = {name: TritonSpec(**s) for name, s in bundle.manifest["specs"].items()}
        self.modules = {specs[name]: _Module(name, found) for name, found in kernels.items()}

    def call(self, name: str, *args: Any) -> None:
        """Call the driver.

        Raises:
            CompileError: It returned an error.
        """
        code = getattr(self._driver, name)(*args)
        if code:
            raise CompileError(f"{name} failed with CUDA error {code}")

    def _check_architecture(self, target: str, device: int) -> None:
        handle, part = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        arch = "sm_"
        for attribute in (_MAJOR, _MINOR):
            self.call("cuDeviceGetAttribute", ctypes.byref(part), ctypes.c_int(attribute), handle)
            arch += str(part.value)
        if arch != target:
            raise CompileError(
                f"the bundle is for {target}, device {device} is {arch}; build one with "
                f"skimp aot --target {arch}"
            )

    def _load(self, entry: dict[str, Any], binary: bytes) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(binary))
        symbol = ctypes.c_char_p(entry["entry"].encode())
        self.call("cuModuleGetFunction", ctypes.byref(function), module, symbol)
        if entry["shared"] > _SHARED_UNASKED:
            shared = ctypes.c_int(entry["shared"])
            self.call("cuFuncSetAttribute", function, ctypes.c_int(_MOST_SHARED), shared)
        return function


class _Module:
    """Kernels by name; which one of a name, its constants say."""

    def __init__(self, name: str, kernels: dict[Any, "_Function"]) -> None:
        self._name, self._kernels = name, kernels

    def __getattr__(self, function: str) -> "_Choice":
        return _Choice(self._name, function, self._kernels)


class _Choice:
    """Launched like a kernel of Triton: ``choice[grid](*arguments, **constants)``."""

    def __init__(self, name: str, function: str, kernels: dict[Any, "_Function"]) -> None:
        self._name, self._function, self._kernels = name, function, kernels

    def __getitem__(self, grid: tuple[int, ...]) -> partial[None]:
        return partial(self._run, grid)

    def _run(
        self, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **c: int
    ) -> None:
        found = self._kernels.get(_key(self._function, c))
        if found is None:
            raise CompileError(
                f"the bundle has no kernel {self._function} of {self._name} with {c}; build it "
                "again with skimp aot"
            )
        found(grid, args)


def _key(function: str, constants: dict[str, int]) -> tuple[Any, ...]:
    return (function, *sorted((name, int(value)) for name, value in constants.items()))


class _Function:
    """One loaded kernel."""

    def __init__(self, loaded: Loaded, entry: dict[str, Any], handle: ctypes.c_void_p) -> None:
        self._loaded, self._entry, self._handle = loaded, entry, handle
        self._kinds = [k for k in entry["signature"].values() if k != "constexpr"]

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Launch on the current stream of PyTorch.

        Raises:
            CompileError: Arguments that the kernel was not compiled for, or the driver's error.
        """
        entry = self._entry
        packed = [self._pack(*pair) for pair in zip(self._kinds, args, strict=True)]
        # the kernel's last parameters point to scratch memory, of which none was asked for
        packed += [ctypes.c_void_p() for _ in range(entry["parameters"] - len(packed))]
        pointers = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(p) for p in packed))
        sizes = (*grid, *[1] * (3 - len(grid)), 32 * entry["warps"], 1, 1, entry["shared"])
        stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
        self._loaded.call(
            "cuLaunchKernel", self._handle, *map(ctypes.c_uint, sizes), ctypes.c_void_p(stream),
            pointers, ctypes.c_void_p(),
        )  # fmt: skip

    def _pack(self, kind: str, value: Any) -> Any:
        if kind == "i32":
            return ctypes.c_int32(value)
        assert isinstance(value, Tensor)
        if value.dtype != _DTYPES[kind] or value.data_ptr() % _ALIGNED:
            raise CompileError(
                f"{self._entry['name']} takes {kind} aligned to {_ALIGNED} bytes, and was given "
                f"{value.dtype} at {value.data_ptr():#x}; copy the tensor, or serve no bundle"
            )
        return ctypes.c_void_p(value.data_ptr())


def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompileError(f"no CUDA driver on this machine ({error})") from error
