"""Who may import whom, held by reading the source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import hamcli

PACKAGE = Path(hamcli.__file__).parent
LAZY = {"transformers", "datasets", "accelerate", "triton", "matplotlib", "scipy"}
LAZY |= {"onnx", "onnxruntime", "openvino"}
TORCHLESS = ("errors.py", "recipe", "progress.py", "cli/", "console.py", "gate.py", "defaults.py",
             "parallel/launch.py", "parallel/mates.py", "parallel/__init__.py")  # fmt: skip


# modules that nobody imports who lacks the library
HOMES = {"optim/kernel.py": {"triton"}, "integration/trainer.py": {"transformers"}}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def dotted(name):
    return ("hamcli/" + name).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_module_is_above_and_below_another():
    trees = {dotted(name): tree for name, tree in modules()}
    above = {}
    for name, tree in trees.items():
        wanted = set(imported(tree.body))
        froms = (node for node in tree.body if isinstance(node, ast.ImportFrom))
        wanted |= {f"{node.module}.{one.name}" for node in froms for one in node.names}
        above[name] = {one for one in wanted - {name} if one in trees and not is_own(name, one)}
    tuple(graphlib.TopologicalSorter(above).static_order())  # raises where there is a circle


def is_own(name, package):
    """Whether a module imports from the package it lies in, whose __init__ imports it."""
    return name.startswith(package + ".")


def test_heavy_libraries_are_imported_inside_functions():
    for name, tree in modules():
        found = {one.partition(".")[0] for one in imported(tree.body)}
        assert not found & LAZY - HOMES.get(name, set()), name


def test_importing_the_package_loads_nothing_heavy():
    code = "import hamcli, sys; print(*({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout.split() == []


def test_nothing_imports_the_command_line_and_only_it_imports_the_console():
    for name, tree in modules():
        found = set(imported(ast.walk(tree)))
        is_cli = name.startswith("cli/")
        if name != "__main__.py" and not is_cli:
            assert not any(one.startswith("hamcli.cli") for one in found), name
        if not is_cli:
            assert "hamcli.console" not in found, name


def test_the_optimizer_imports_nothing_of_ours():
    for name, tree in modules():
        if name.startswith("optim/"):
            ours = {one for one in imported(ast.walk(tree)) if one.startswith("hamcli")}
            assert all(one.startswith(("hamcli.optim", "hamcli.native")) for one in ours), name


def test_light_rooms_import_no_torch_at_the_top():
    for name, tree in modules():
        if name.startswith(TORCHLESS):
            assert "torch" not in {one.partition(".")[0] for one in imported(tree.body)}, name


def test_exported_names_are_there():
    for name in hamcli.__all__:
        assert getattr(hamcli, name) is not None
