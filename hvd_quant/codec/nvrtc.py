"""CUDA C++ compiled at run time by NVRTC, which torch ships, and launched by the driver.

Both are called by their C interfaces, which are stable. torch's own function for it, from 2.8 on, is private,
changes, and needs a CUDA toolkit's folder.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

Argument: TypeAlias = (
    torch.Tensor | int | float
)  # kernel arguments: an address, an unsigned 32-bit integer, a float32


class Module:
    """Compiled kernels of a source, which are ``extern "C"``, for a GPU.

    Args:
        source: CUDA C++ without includes.
        options: options of NVRTC.
        device: the GPU, with an index.

    Raises:
        OSError: the libraries are not found.
        RuntimeError: compilation or loading fails.
    """

    def __init__(self, source: str, options: Sequence[str], device: torch.device) -> None:
        self._device, self._functions = device, {}
        self._driver, self._module = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        binary = compiled(source, options, torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's context current in this thread
            self._succeed("cuModuleLoadData", ctypes.byref(self._module), binary)

    def launch(self, name: str, blocks: int, threads: int, arguments: Sequence[Argument]) -> None:
        """Start a kernel on the current stream: ``blocks`` blocks of ``threads`` threads."""
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._succeed("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
            self._functions[name] = function
        values = [as_c(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            size = (blocks, 1, 1, threads, 1, 1)
            self._succeed("cuLaunchKernel", self._functions[name], *size, 0, stream, addresses, None)

    def _succeed(self, name: str, *arguments: object) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")


def as_c(argument: Argument) -> ctypes.c_void_p | ctypes.c_uint32 | ctypes.c_float:
    """Convert an argument to what the driver expects."""
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_uint32(argument)


def compiled(source: str, options: Sequence[str], capability: tuple[int, int]) -> bytes:
    """Compile a source to machine code for a GPU's compute capability.

    Raises:
        OSError: there is no NVRTC.
        RuntimeError: compilation fails; with NVRTC's log.
    """
    nvrtc, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()

    def text(of: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{of}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{of}")(program, data)
        return data.raw

    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None) != 0:
        raise RuntimeError("NVRTC takes no program")
    try:
        options = [f"--gpu-architecture=sm_{_architecture(nvrtc, capability)}", *options]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given) != 0:
            raise RuntimeError(f"NVRTC says: {text('ProgramLog').decode().strip(chr(0))}")
        return text("CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _architecture(nvrtc: ctypes.CDLL, capability: tuple[int, int]) -> int:
    """Return the GPU's architecture, or the newest one that NVRTC knows and that runs there."""
    wanted, number = 10 * capability[0] + capability[1], ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(number))
    known = (ctypes.c_int * number.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    return max((one for one in known if one // 10 == capability[0] and one <= wanted), default=wanted)


def _library() -> ctypes.CDLL:
    """Load the library of torch's packages, or else the one that the linker finds."""
    version = (torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{'11.2' if version == '11' else version}"
    packages = Path(torch.__file__).parents[1]
    bundled = [path for path in packages.glob("torch/lib/libnvrtc*.so*") if "builtins" not in path.name]
    for path in (*packages.glob(f"nvidia/*/lib/{name}*"), *bundled, name):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    raise OSError(f"{name} is neither in {packages} nor elsewhere")
