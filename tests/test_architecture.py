"""The shape of the house: arrows of import go one way and never round, and no file grows too long to be read.

Imports inside functions count: they would hide a circle, not break it. Those under `if TYPE_CHECKING` do not, for they
never happen. Neither do the "module:attribute" texts of a registry (kernels.registry): an entry is resolved by name at
run time, which is just how a base class can offer its subclasses without an import of them.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("harness", "methods", "kernels")
LONGEST = 500  # lines
NEVER = {  # module or package -> what neither it nor a module inside it imports
    "kernels": ("methods", "harness"),
    "methods": ("harness",),
    "kernels.formats": ("kernels.cpu", "kernels.triton"),
    "kernels.dispatch": ("kernels.formats", "kernels.cpu", "kernels.triton"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def edges() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports. `from package import module` is an edge to the module alone, as it
    is where a package's `__init__` does not say the name itself."""
    return {name: set(imported(path, name)) for name, path in modules().items()}


def imported(path: Path, importer: str) -> Iterator[str]:
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
            continue
        base = node.module or ""
        if node.level:  # relative to the package of the importer
            package = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            found = f"{base}.{alias.name}"
            target = found if found in modules() else base
            if target in modules() and target != importer:
                yield target


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from statements(other)
        else:
            yield from statements(node)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other, by Tarjan's algorithm; and nodes with an edge to themselves."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            start = stack.index(node)
            members, stack[start:] = stack[start:], []
            if len(members) > 1 or node in graph[node]:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_there_is_no_circle_of_imports() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert "kernels.dispatch" in edges()["kernels.formats.packed"]
    assert circles(edges()) == []


def room(module: str) -> str:
    """The folder or file directly under a package: "harness.plan", "harness.model"."""
    return ".".join(module.split(".")[:2])


def test_there_is_no_circle_of_rooms_in_the_harness() -> None:
    graph: dict[str, set[str]] = {}
    for importer, targets in edges().items():
        others = {room(target) for target in targets if inside(target, "harness")} - {room(importer), "harness"}
        if inside(importer, "harness") and importer not in ("harness", "harness.__main__"):  # doors are no rooms
            graph.setdefault(room(importer), set()).update(others)
    assert circles(graph) == []
    assert len(graph) < 16, "a wing with more rooms than that is no longer known by heart"


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", NEVER)
def test_arrows_go_one_way(package: str) -> None:
    wrong = [
        f"{importer} -> {target}"
        for importer, targets in edges().items()
        for target in targets
        if inside(importer, package) and any(inside(target, other) for other in NEVER[package])
    ]
    assert wrong == []


def test_every_file_can_be_read_at_one_sitting() -> None:
    suffixes = (".py", ".cpp", ".h")
    folders = (*PACKAGES, "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length >= LONGEST} == {}
