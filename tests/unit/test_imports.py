"""The package's floors: nothing imports upward, and the core needs NumPy alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hvd_quant

PACKAGE = Path(hvd_quant.__file__).parent
FRAMEWORKS = ("torch", "tensorflow", "horovod", "mpi4py", "keras")
# From the bottom up. What stands on one line may not import from each other, but for the codec's own parts.
FLOORS = [
    ["schemes", "schedule", "wire", "version", "require"],
    ["codec"],
    ["exchange"],
    ["reducer"],
    ["horovod"],
    ["torch", "tensorflow", "mpi"],
    ["cli"],
]
# Who may import which framework; nobody else may import any.
ALLOWED = {
    "codec/cuda.py": {"torch"},
    "codec/nvrtc.py": {"torch"},
    "codec/torch_bytes.py": {"torch"},
    "codec/torch_ops.py": {"torch"},
    "codec/torch_rounding.py": {"torch"},
    "codec/tf_bytes.py": {"tensorflow"},
    "codec/tf_ops.py": {"tensorflow"},
    "codec/tf_rounding.py": {"tensorflow"},
    "horovod.py": {"horovod"},
    "torch": {"torch", "horovod"},
    "tensorflow": {"tensorflow", "keras", "horovod"},
    "mpi": {"mpi4py"},
    "cli": set(FRAMEWORKS),
}


@pytest.mark.parametrize("module", ["hvd_quant", "hvd_quant.codec", "hvd_quant.cli"])
def test_core_imports_no_framework(module):
    script = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert ("numpy" in loaded) == (module == "hvd_quant.codec")  # the others must work without
    assert not loaded & set(FRAMEWORKS)


def test_arrays_are_encoded_without_torch():
    script = (
        "import sys, numpy, hvd_quant as q\n"
        "q.decode(q.encode(numpy.ones(9, 'f4'), q.QSGD()))\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def is_lazy(node, parents):
    """Whether an import runs only when a function is called, or only for type checkers."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return True
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return True
    return False


def imports(path):
    """The absolute names of what a file imports, each with whether it is imported lazily."""
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    package = ("hvd_quant", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, is_lazy(node, parents)) for name in names)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(parts):
    """Name and floor of the part of the package that a path, or a module's name, belongs to."""
    name = parts[0].removesuffix(".py")
    return name, next((number for number, floor in enumerate(FLOORS) if name in floor), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upward(path):
    relative = path.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        return
    name, floor = part_of(relative.parts)
    assert floor is not None, f"{relative} is on no floor: add it to FLOORS"
    for imported, _ in imports(path):
        if imported.startswith("hvd_quant."):
            other, below = part_of(imported.split(".")[1:])
            # A name that is no part, such as `from hvd_quant import QSGD`, goes through the whole core.
            assert below is not None or floor >= 2, f"{relative} imports {imported}"
            if below is not None:
                assert below < floor or other == name or below == floor == 0, f"{relative} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_are_imported_by_their_plugs_alone(path):
    relative = path.relative_to(PACKAGE)
    allowed = ALLOWED.get(relative.as_posix(), ALLOWED.get(relative.parts[0], set()))
    if relative == Path("codec/__init__.py"):
        allowed = {name for name, lazy in imports(path) if lazy and name == "torch"}
        assert ("torch", False) not in set(imports(path))
        assert not any(
            name.startswith("hvd_quant.codec.torch_ops") and not lazy for name, lazy in imports(path)
        )
    used = {name.split(".")[0] for name, _ in imports(path)} & set(FRAMEWORKS)
    assert used <= allowed, f"{relative} imports {used - allowed}"


# As in a checkout in which nothing has been built; an editable install of another one must not help out.
UNBUILT = """
import sys
class Nothing:
    @staticmethod
    def find_spec(name, *_):
        if name == "hvd_quant.codec._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing)
"""


@pytest.mark.parametrize(
    "use",
    [
        "import hvd_quant; hvd_quant.encode",
        "from hvd_quant import decode",
        "import hvd_quant.codec.native",
        "from hvd_quant.codec import _native",
        "import hvd_quant.exchange.layout",
    ],
)
def test_a_codec_that_is_not_built_says_how_to_build_it(use):
    done = subprocess.run([sys.executable, "-c", UNBUILT + use], capture_output=True, text=True)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("ImportError: the native codec of hvd_quant is not built")
    assert "`pip install -e .` or scripts/setup.sh" in last
    assert last.endswith(str(PACKAGE.parent))


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known_ones():
    environment = {**os.environ, "HVD_QUANT_ISA": "mmx"}
    done = subprocess.run(
        [sys.executable, "-c", "import hvd_quant.codec"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1  # no crash
    assert "no instruction set 'mmx' on this machine; available: portable" in done.stderr


def test_the_instruction_set_can_be_chosen():
    environment = {**os.environ, "HVD_QUANT_ISA": "portable"}
    command = [sys.executable, "-c", "import hvd_quant; print(hvd_quant.native_isa())"]
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout == "portable\n"
