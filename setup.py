"""The build steps that pyproject.toml cannot say: in a wheel the package `kernels` is called `harness_kernels`.

Hugging Face publishes another package called `kernels`, which transformers imports where it is installed. In the
checkout, and in an editable install of it, our folder keeps its name. A wheel must be able to stand beside theirs, so
building one writes the package under its second name, and renames it in every import, registry entry and docstring.
"""

from __future__ import annotations

import ast
import io
import re
import shutil
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

OURS, INSTALLED = "kernels", "harness_kernels"
TEXT = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
LOADERS = {"import_module", "__import__", "find_spec", "files"}

Place = tuple[int, int]  # of a token: line from 1, character from 0


def renamed(source: str, modules: Collection[str]) -> str:
    """The source with our package under its installed name: in code by its syntax, in strings and comments by its text.

    Text is renamed where one of our `modules` follows ("kernels.formats"), never in names of files ("kernels/cpu",
    "kernels.csv") or of others ("integrations.gguf.kernels"). Raises ValueError where something is left over that would
    mean the other package.
    """
    lines = source.splitlines(keepends=True)
    text = re.compile(rf"(?<![\w./-]){OURS}(?=\.(?:{'|'.join(sorted(map(re.escape, modules)))})\b)")
    places = set(_places(ast.parse(source), lines))
    edits: list[tuple[Place, Place, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start in places:
            edits.append((token.start, token.end, INSTALLED))
        elif token.type in TEXT and text.search(token.string):
            edits.append((token.start, token.end, text.sub(INSTALLED, token.string)))
    for (first, start), (last, end), new in reversed(edits):
        lines[first - 1 : last] = [lines[first - 1][:start] + new + lines[last - 1][end:]]
    result = "".join(lines)
    _check(ast.parse(result))
    return result


def _places(tree: ast.Module, lines: list[str]) -> Iterator[Place]:
    """Where the name of our package stands in the code: in imports, and where one of them has bound it."""
    bound = _binds(tree, OURS)
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (_place(alias, lines) for alias in node.names if _top(alias.name) == OURS)
            case ast.ImportFrom(level=0) if _top(node.module) == OURS:
                line, start = _place(node, lines)
                yield line, lines[line - 1].index(OURS, start)
            case ast.Name(id=name) if bound and name == OURS:
                if not isinstance(node.ctx, ast.Load):
                    raise ValueError(f"line {node.lineno}: '{OURS}' is the package and a variable; rename the variable")
                yield _place(node, lines)


def _check(tree: ast.Module) -> None:
    """Raises ValueError where renamed code still asks for `kernels`: for the other package, or for none."""
    bound = _binds(tree, INSTALLED)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr) and _left_over(node, bound):
            raise ValueError(f"line {node.lineno}: in a wheel '{OURS}' is not ours: {ast.unparse(node)}")


def _left_over(node: ast.stmt | ast.expr, bound: bool) -> bool:
    match node:
        case ast.Import():
            return any(_top(alias.name) == OURS for alias in node.names)
        case ast.ImportFrom(level=0):
            return _top(node.module) == OURS
        case ast.Name(id=name):
            return bound and name == OURS
        case ast.Call(args=[ast.Constant(value=str(name)), *_]):
            return _top(name) == OURS and ast.unparse(node.func).rpartition(".")[2] in LOADERS
        case ast.Constant(value=str(entry)):  # of a registry
            return re.fullmatch(rf"{OURS}(\.\w+)*:\w+", entry) is not None
    return False


def _binds(tree: ast.Module, package: str) -> bool:
    """Whether an import makes the package's bare name a variable."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return any(_top(alias.name) == package and not alias.asname for node in imports for alias in node.names)


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _place(node: ast.stmt | ast.expr | ast.alias, lines: list[str]) -> Place:
    """The first character of a node; syntax trees count bytes."""
    return node.lineno, len(lines[node.lineno - 1].encode()[: node.col_offset].decode())


class BuildPy(build_py):
    """Copies the packages for a wheel, then renames one of them. An editable install copies nothing."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        library = Path(self.build_lib)
        tops = set(map(_top, self.packages))
        for name in (*tops, INSTALLED):  # of an earlier build: what has been deleted since would be in the wheel
            shutil.rmtree(library / name, ignore_errors=True)
        super().run()
        (library / OURS).rename(library / INSTALLED)
        modules = {path.stem for path in (library / INSTALLED).iterdir()}
        for path in sorted(path for top in tops - {OURS} | {INSTALLED} for path in (library / top).rglob("*.py")):
            try:
                path.write_text(renamed(path.read_text("utf-8"), modules), "utf-8")
            except ValueError as error:
                raise ValueError(f"{path.relative_to(library)}, {error}") from error


class EggInfo(egg_info):
    """Metadata that claim the installed names: transformers looks there for who brings a package `kernels`."""

    def run(self) -> None:
        super().run()
        file = Path(self.egg_info, "top_level.txt")
        names = {INSTALLED if name == OURS else name for name in file.read_text("utf-8").split()}
        file.write_text("".join(f"{name}\n" for name in sorted(names)), "utf-8")


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy, "egg_info": EggInfo})
