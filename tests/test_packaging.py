"""What an installed package needs, and conventions of the source tree."""

import ast
import importlib
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import dlm_jax

ROOT = pathlib.Path(dlm_jax.__file__).parents[1]
MODULES = sorted((ROOT / "dlm_jax").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
# Packages whose import name differs from the name to install.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint"}
SERVING = {"prometheus_client", "pydantic", "sse_starlette", "starlette", "uvicorn"}
OPTIONAL = {"datasets", "evaluate", "lm_eval", "torch", "wandb", *SERVING}


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """The arguments that setup.py passes to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def required() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {re.split(r"[<>=!;\[ ]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def test_all_packages_are_shipped_with_recipes_and_assets(setup_arguments):
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES}
    assert rooms | {"dlm_jax.configs", "dlm_jax.assets"} == set(setup_arguments["packages"])
    assert {re.split(r"[<>=[]", line)[0].lower() for line in setup_arguments["install_requires"]} == required()


def test_data_files_are_shipped(setup_arguments):
    for path in (ROOT / "dlm_jax").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            folders = [parent.relative_to(ROOT) for parent in path.parents if parent.is_relative_to(ROOT / "dlm_jax")]
            assert any(path.relative_to(ROOT / folder).match(pattern) for folder in folders
                       for pattern in setup_arguments["package_data"].get(".".join(folder.parts), ())), path


def test_entry_point_exists(setup_arguments):
    (script,) = setup_arguments["entry_points"]["console_scripts"]
    name, module, function = re.fullmatch(r"(\w+)=([\w.]+):(\w+)", script).groups()
    assert name == "dlm" and callable(getattr(importlib.import_module(module), function))


def test_imports_are_required():
    needed = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                needed.add(node.module.split(".")[0])
    needed -= set(sys.stdlib_module_names) | {"dlm_jax"} | OPTIONAL
    assert {DISTRIBUTIONS.get(name, name).replace("_", "-").lower() for name in needed} <= required()


def test_every_module_has_a_docstring():
    modules = [path for path in MODULES if path.name != "__init__.py"]
    assert not [path.name for path in modules if not ast.get_docstring(ast.parse(path.read_text()))]


def test_tests_mirror_the_packages():
    rooms = {path.parent.relative_to(ROOT / "dlm_jax") for path in MODULES}
    assert not {room for room in rooms if not list((ROOT / "tests" / room).glob("test_*.py"))}


@pytest.mark.parametrize("script", [*sorted(path.name for path in (ROOT / "launch").glob("*.sh")), "../.ci/run"])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / "launch" / script], check=False).returncode == 0


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_finds_what_it_imports_and_prints_its_usage(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(path.parent)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("dlm_jax", "tests", "harness"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
    if "__main__" in path.read_text():
        monkeypatch.setattr(sys, "argv", [path.name, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == 0 and "usage" in capsys.readouterr().out
