"""The architecture as a table: who may import whom, what is light, what is small, what is explained."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "mhajax").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# A module of the library imports only from rows above its own, or from its own folder.
LAYERS = [
    {"arguments"},
    {
        "masks",
        "precision",
        "positions",
        "scores",
        "dropout",
        "norm",
        "mlp",
        "losses",
        "tree",
        "version",
        "checkpoints",
        "statistics",
    },
    {"interventions", "attentions", "weight_decay", "accumulation"},
    {"kernels", "embedding", "checks"},
    {"options"},
    {"attention"},
    {"cache", "convert", "drop_in", "variants"},
    {"block"},
    {"transformer"},
    {"language_model", "translator", "encoder"},
    {"heads", "pretrained", "decoding", "training", "sharding", "figures", "view"},
    {"report"},
    {"linen", "nnx"},
    {"__init__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# These know no model: they take functions and arrays.
KNOW_NO_MODEL = {"losses", "decoding", "training", "checkpoints", "figures", "view"}
# Packages from outside that only some may import; whoever is not listed stays with JAX and NumPy.
ONLY = {"flax": {"linen", "nnx"}, "optax": {"training", "accumulation"}}
HEAVY = ("matplotlib", "orbax", "tokenizers", "safetensors", "flax", "optax", "torch", "transformers")


def name_of(path: Path) -> str:
    """mhajax/masks.py and everything in mhajax/masks/ are "masks"."""
    return path.relative_to(ROOT / "mhajax").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of_library(path: Path) -> set[str]:
    """Modules of the library that a file imports."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("mhajax.")}
    assert names <= set(RANK), f"{path}: {names - set(RANK)} have no place in LAYERS"
    return names


ids = lambda path: str(path.relative_to(ROOT))  # noqa: E731


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_imports_go_one_way(path):
    own = name_of(path)
    assert own in RANK, "a new module: give it a place in LAYERS"
    assert [name for name in of_library(path) - {own} if RANK[name] >= RANK[own]] == []
    assert "mhajax" not in imports(path)
    if own in KNOW_NO_MODEL:
        assert [name for name in of_library(path) - {own} if RANK[name] > 2] == []


def files_at_import(path: Path) -> set[Path]:
    """The library's files that a file imports while it is imported itself: not what functions import, or types only."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mhajax":
            module = ROOT.joinpath(*node.module.split("."))
            for alias in node.names:  # a submodule, or a name in the module
                inner = module / alias.name
                here = (
                    inner.with_suffix(".py"),
                    inner / "__init__.py",
                    module.with_suffix(".py"),
                    module / "__init__.py",
                )
                found.add(next(file for file in here if file.exists()))
    return found


def test_no_file_imports_itself_by_way_of_others():
    """Inside folders too: whatever has all that it imports behind it is taken away, until nothing is left."""
    needs = {path: files_at_import(path) for path in LIBRARY}
    while ready := {path for path, others in needs.items() if not others & set(needs)}:
        needs = {path: others for path, others in needs.items() if path not in ready}
    assert sorted(map(ids, needs)) == []


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_only_the_layers_for_it_import_other_libraries(path):
    packages = {name.split(".")[0] for name in imports(path)}
    assert "experiments" not in packages
    for package, who in ONLY.items():
        assert package not in packages or name_of(path) in who


def test_importing_the_library_is_light():
    code = "import sys, mhajax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"jax", "mhajax"} <= loaded
    assert loaded & set(HEAVY) == set()


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS + TESTS, ids=ids)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) < 450
    assert path.name != "utils.py"


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_everything_public_is_explained(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert ast.get_docstring(tree), "the module itself"
