"""How NVRTC and the driver are called, with libraries in their place that tell what they were given."""

import contextlib
import ctypes
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from hvd_quant.codec import nvrtc

# Compiles everything but what has "error" in it; the binary is the source and its options. Launches one
# kernel, with an address, an integer and a float32, and fails if there are too many threads.
LIBRARY = """
#include <stdlib.h>
#include <string.h>
char binary[1000], log_[] = "line 1: error"; int alive;
int nvrtcGetNumSupportedArchs(int* n) { *n = 3; return 0; }
int nvrtcGetSupportedArchs(int* to) { to[0] = 75, to[1] = 80, to[2] = 86; return 0; }
int nvrtcCreateProgram(void** p, const char* source, const char* name, int n, void* a, void* b) {
  strcpy(binary, source); *p = binary; ++alive; return n + (a || b);
}
int nvrtcCompileProgram(void* p, int n, const char** options) {
  for (int i = 0; i < n; ++i) strcat(strcat(binary, " "), options[i]);
  return strstr(binary, "error") ? 6 : 0;
}
int nvrtcGetProgramLogSize(void* p, size_t* n) { *n = sizeof log_; return 0; }
int nvrtcGetProgramLog(void* p, char* to) { memcpy(to, log_, sizeof log_); return 0; }
int nvrtcGetCUBINSize(void* p, size_t* n) { *n = strlen(binary); return 0; }
int nvrtcGetCUBIN(void* p, char* to) { memcpy(to, binary, strlen(binary)); return 0; }
int nvrtcDestroyProgram(void** p) { --alive; return *p != binary; }
char loaded[1000];
struct { unsigned sizes[7]; void* stream; float* at; unsigned n; float x; } seen;
int cuModuleLoadData(void** m, const void* image) { strcpy(loaded, image); *m = loaded; return 0; }
int cuModuleGetFunction(void** f, void* m, const char* name) { *f = strstr(m, name); return *f ? 0 : 500; }
int cuGetErrorString(int status, const char** text) { if (status == 1) *text = "invalid argument"; return 0; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** args, void** extra) {
  if (bx > 1024 || extra) return 1;
  unsigned sizes[7] = {gx, gy, gz, bx, by, bz, shared};
  memcpy(seen.sizes, sizes, sizeof sizes), seen.stream = stream;
  seen.at = *(float**)args[0], seen.n = *(unsigned*)args[1], seen.x = *(float*)args[2];
  return 0;
}
"""


class Seen(ctypes.Structure):
    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("at", ctypes.c_void_p),
        ("n", ctypes.c_uint),
        ("x", ctypes.c_float),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("clang") or pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "both.c").write_text(LIBRARY)
    command = [compiler, "-shared", "-fPIC", folder / "both.c", "-o", folder / "both.so"]
    subprocess.run(command, check=True, timeout=60)
    return str(folder / "both.so")


@pytest.fixture
def library(path, monkeypatch):
    """Both libraries, and a GPU whose current stream is 4711."""
    stream = SimpleNamespace(synchronize=lambda: None, cuda_stream=4711)
    cuda = SimpleNamespace(
        device=lambda device: contextlib.nullcontext(),
        current_stream=lambda: stream,
        get_device_capability=lambda device: (8, 6),
    )
    fake = SimpleNamespace(
        cuda=cuda, Tensor=torch.Tensor, version=SimpleNamespace(cuda="13.0"), __file__=torch.__file__
    )
    both = ctypes.CDLL(path)
    monkeypatch.setattr(nvrtc, "torch", fake)
    monkeypatch.setattr(nvrtc, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: both}))
    return both


def test_a_kernel_is_compiled_and_launched(library):
    module = nvrtc.Module("void kernel()", ["--fmad=false"], torch.device("cuda", 0))
    loaded = (ctypes.c_char * 1000).in_dll(library, "loaded").value
    assert loaded == b"void kernel() --gpu-architecture=sm_86 --fmad=false"
    x = torch.ones(3)
    module.launch("kernel", 5, 256, [x, 2**32 - 1, 0.75])
    seen = Seen.in_dll(library, "seen")
    assert list(seen.sizes) == [5, 1, 1, 256, 1, 1, 0]
    assert (seen.stream, seen.at, seen.n, seen.x) == (4711, x.data_ptr(), 2**32 - 1, 0.75)
    assert ctypes.c_int.in_dll(library, "alive").value == 0


def test_what_the_driver_refuses(library):
    module = nvrtc.Module("void kernel()", [], torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"^cuModuleGetFunction: unknown error$"):
        module.launch("other", 1, 32, [])
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernel: invalid argument$"):
        module.launch("kernel", 1, 2048, [torch.ones(1), 1, 1.0])


def test_what_nvrtc_refuses(library):
    with pytest.raises(RuntimeError, match=r"^NVRTC says: line 1: error$"):
        nvrtc.compiled("error", [], (8, 6))
    assert ctypes.c_int.in_dll(library, "alive").value == 0


@pytest.mark.parametrize(
    ("capability", "chosen"), [((8, 6), 86), ((8, 9), 86), ((8, 0), 80), ((7, 5), 75), ((9, 0), 90)]
)
def test_the_architecture(library, capability, chosen):
    """One that this NVRTC knows and whose code runs on the GPU; or its own, which NVRTC will refuse."""
    assert f"--gpu-architecture=sm_{chosen}".encode() in nvrtc.compiled("", [], capability)


@pytest.mark.parametrize(("version", "file"), [("13.0", "libnvrtc.so.13"), ("11.8", "libnvrtc.so.11.2")])
def test_where_nvrtc_is_looked_for(monkeypatch, tmp_path, version, file):
    """First in torch's packages, where libraries of other names lie, too."""
    names = [
        "nvidia/cu/lib/libnvrtc-builtins.so.13.0",
        "torch/lib/libnvrtc-builtins.so.12",
        "torch/lib/libcufft.so",
    ]
    for name in [
        *names,
        "torch/lib/libnvrtc-b51b.so.12",
        f"nvidia/cu/lib/{file}",
        "nvidia/cu/lib/libnvrtc.so.99",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tried = []

    def refuse(name):
        tried.append(name.removeprefix(f"{tmp_path}/"))
        raise OSError

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", refuse)
    with pytest.raises(OSError, match=f"^{file} is neither in"):
        nvrtc.compiled("", [], (8, 6))
    assert tried == [f"nvidia/cu/lib/{file}", "torch/lib/libnvrtc-b51b.so.12", file]
