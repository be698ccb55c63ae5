"""Machines that are odd on purpose: stubs and patches for the Python that `hvd-quant doctor` is run with."""

import json
import os
import subprocess
import sys
import textwrap

TORCH = """
__version__ = "2.13.0"
class version: cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: {gpus} > 0)
    device_count = staticmethod(lambda: {gpus})
def get_num_threads(): return 1
"""
TENSORFLOW = """
__version__ = "2.21.0"
class sysconfig: get_build_info = staticmethod(dict)
class config: list_physical_devices = staticmethod(lambda kind: [])
class keras: __version__ = {keras!r}
"""
HOROVOD = """
def mpi_built(): return {mpi}
def gloo_built(): return {gloo}
def nccl_built(): return {nccl}
cuda_built = rocm_built = nccl_built
"""
# What Horovod does of which an extension was not built.
NOT_BUILT = {
    "torch": "print('Extension horovod.torch has not been built')",
    "tensorflow": "raise ImportError('Extension horovod.tensorflow has not been built')",
}

# In front of everything that the interpreter does: packages named so are not there.
HIDE = """
import importlib.machinery, importlib.metadata
_find, _list = importlib.machinery.PathFinder.find_spec, importlib.metadata.distributions
_hidden = {names!r}
def find_spec(name, *more):
    return None if name.partition(".")[0] in _hidden else _find(name, *more)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
importlib.metadata.distributions = lambda: (
    one for one in _list() if one.name.lower().replace("-", "_") not in _hidden)
"""


class Machine:
    """What Python finds first, in a folder.

    By default, there are torch's CPU build and Horovod for it, and neither TensorFlow nor mpi4py.
    """

    def __init__(self, folder):
        self.folder = folder
        self.environment = {}
        self.write("torch/__init__.py", TORCH.format(cuda=None, gpus=0))
        self.write("horovod/__init__.py", "")
        self.horovod()
        self.hide("tensorflow", "tensorflow_cpu", "mpi4py")

    def write(self, path, text):
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))

    def horovod(self, framework="torch", mpi=True, gloo=True, nccl=False):
        text = HOROVOD.format(mpi=mpi, gloo=gloo, nccl=nccl)
        self.write(f"horovod/{framework}/__init__.py", text)

    def hide(self, *names):
        self.patches = HIDE.format(names=names)
        self.write("sitecustomize.py", self.patches)

    def patch(self, text):
        """Have every interpreter run this first."""
        self.patches += textwrap.dedent(text)
        self.write("sitecustomize.py", self.patches)

    def doctor(self, before=()):
        """What the doctor finds: its exit status, and the diagnosis."""
        command = [*before, sys.executable, "-m", "hvd_quant.cli", "doctor", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), **self.environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout)


def names(diagnosis, *levels):
    """Of its findings."""
    return {one["name"] for one in diagnosis["findings"] if not levels or one["level"] in levels}
