"""The layering of the package, read from its imports, and how light its entry points are."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bmm

ROOT = Path(bmm.__file__).parent
CLI = ROOT.parent / "cli"
# A file imports only from the layers above its own.
LAYERS = [
    ["errors", "dominance"],
    ["notation", "records", "progress", "functions", "roles", "shared", "yaml_file"],
    ["linalg", "groups"],
    ["checkpoint"],
    ["grams"],
    ["fisher"],
    ["anchors"],
    ["solver"],
    ["norms"],
    ["repool"],
    ["layouts"],
    ["inventory"],
    ["evaluation"],
    ["merging", "tasks"],
    ["sequential", "streamed"],
    ["search"],
    ["analysis"],
    ["zoo", "recipe", "report"],
    ["loading", "statistics", "memory"],
    ["run"],
    ["opening", "choosing", "workers", "adapting"],
    ["writing"],
    ["rebasin"],
    ["tuning", "masking", "trajectory", "mergekit"],
    ["posterior"],
    ["saving"],
    ["api"],
    ["__init__"],
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(p for p in ROOT.rglob("*.py") if "build" not in p.relative_to(ROOT).parts[:-1])


def room(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path):
    """Rooms of bmm that a file imports at run time."""
    package = ["bmm", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            stem = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            targets = [[*stem, a.name] for a in node.names] if len(stem) == 1 else [stem]
            yield from (t[1] for t in targets if len(t) > 1)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bmm."):
            yield node.module.split(".")[1]


def test_every_file_has_a_layer():
    assert {room(p) for p in FILES} <= set(DEPTH)


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py" or p.parent != ROOT], ids=str)
def test_imports_point_upwards(path):
    own = room(path)
    for target in imported(path):
        if target in DEPTH and target != own:
            assert DEPTH[target] < DEPTH[own], f"{own} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_library_neither_prints_nor_parses_arguments(path):
    tree = ast.parse(path.read_text())
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert "print" not in calls
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not names & {"argparse", "click"}


@pytest.mark.parametrize("module", ["ax", "botorch", "cma", "optuna", "numpyro", "jax"])
def test_only_engines_import(module):
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(f == module or f.startswith(module + ".") for f in found):
                assert path.relative_to(ROOT).as_posix().startswith("search/engines/"), path


def test_files_stay_small():
    sizes = {p.relative_to(ROOT.parent): len(p.read_text().splitlines()) for p in [*FILES, *CLI.glob("*.py")]}
    assert {p: n for p, n in sizes.items() if n > 350} == {}


def loaded_after(code):
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_bmm_is_light():
    loaded = loaded_after("import bmm")
    assert not loaded & {"ax", "botorch", "gpytorch", "transformers", "plotly", "torch"}


def test_using_the_library_loads_no_search_engine():
    loaded = loaded_after("import bmm; bmm.tune; bmm.Task; bmm.anchors; bmm.solver; bmm.tasks")
    assert not loaded & {"datasets", "pyarrow", "PIL", "ax", "botorch", "gpytorch", "transformers", "plotly"}


def test_a_merge_loads_no_scipy():
    loaded = loaded_after("import bmm_cli.merge, bmm; bmm.merge; bmm.anchors")
    assert "torch" in loaded
    assert "scipy" not in loaded


def test_help_loads_no_torch():
    loaded = loaded_after("from bmm_cli.main import bmm\ntry: bmm(['--help'])\nexcept SystemExit: pass")
    assert not loaded & {"torch", "numpy", "ax", "rich"}


def test_every_package_is_shipped():
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT.parent).parts) for p in ROOT.rglob("__init__.py")}
    assert {*settings["packages"]} == found | {"bmm_cli"}
