"""Figures of how the code reads: `python -m benchmarks.reading` prints them, `trace=false` leaves the slow one out.

Counted over `vlm_train` and `data_pipelines`. Tests keep some of them: see tests/benchmarks/test_reading.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.step_trace import trace_step

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vlm_train", "data_pipelines")
LONG_FILE, LONG_FUNCTION = 300, 50
GIVEN_NAMES = {"main", "forward", "backward"}
"""One-word names that are not ours to choose: Python's and torch's."""

Graph = dict[str, set[str]]


@dataclass
class Imports:
    """Who imports whom, among our modules. `typing_only` are the imports under `if TYPE_CHECKING`."""

    running: Graph = field(default_factory=dict)
    typing_only: Graph = field(default_factory=dict)


@cache
def python_files() -> dict[str, Path]:
    """Module name -> file, a package by its own name."""
    files = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def read_imports() -> Imports:
    """All imports, those inside functions too. A package that Python runs on the way to its module does not count."""
    found = Imports()
    for module, path in python_files().items():
        found.running[module], found.typing_only[module] = set(), set()
        for node, typing_only in _import_nodes(tree_of(path)):
            names = _named_modules(node, module, is_package=path.name == "__init__.py")
            (found.typing_only if typing_only else found.running)[module].update(names - {module})
    return found


def _import_nodes(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, typing_only
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for inner in node.body:
                yield from _import_nodes(ast.Module([inner], []), True)
            for inner in node.orelse:
                yield from _import_nodes(ast.Module([inner], []), typing_only)
        else:
            yield from _import_nodes(node, typing_only)


def _named_modules(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> set[str]:
    """Our modules that one statement names: `from a.b import c` names a.b.c where that is a module, else a.b."""
    known = python_files()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & set(known)
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        above = parts[: len(parts) - node.level + is_package]
        base = ".".join([*above, base] if base else above)
    inner = {f"{base}.{alias.name}" for alias in node.names}
    whole = {base} if any(name not in known for name in inner) else set()
    return (inner | whole) & set(known)


def folder_graph(files: Graph) -> Graph:
    """The imports between siblings: the folders and files that lie directly in one package, for every package.

    An import from a file of folder `a` to one of folder `b` beside it is one of `a` -> `b`, however deep both lie.
    """
    graph: Graph = {}
    for module, imported in files.items():
        for other in imported:
            one, another = _sibling_names(module, other)
            graph.setdefault(one, set()).add(another)
            graph.setdefault(another, set())
    return graph


def _sibling_names(one: str, other: str) -> tuple[str, str]:
    """The two names below the innermost package that holds both modules; a package's own file is `__init__` in it."""
    first, second = one.split("."), other.split(".")
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    package = first[:shared]
    return (
        ".".join([*package, *(first[shared : shared + 1] or ["__init__"])]),
        ".".join([*package, *(second[shared : shared + 1] or ["__init__"])]),
    )


def find_cycles(graph: Graph) -> list[list[str]]:
    """Groups that import each other in a circle (strongly connected components of two or more), largest first."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:  # Tarjan's algorithm
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == index[node]:
            position = stack.index(node)
            group = sorted(stack[position:])
            del stack[position:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=lambda group: (-len(group), group))


def long_files() -> dict[str, int]:
    """Files of more than `LONG_FILE` lines."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files().values()}
    return {_relative_path(path): length for path, length in lengths.items() if length > LONG_FILE}


def iterate_functions() -> Iterator[tuple[Path, str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function: its file, its dotted name in it, its node and whether a Protocol declares it."""
    for path in python_files().values():
        yield from _functions(path, tree_of(path), "", False)


def _functions(path: Path, node: ast.AST, prefix: str, protocol: bool) -> Iterator[tuple[Path, str, Any, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield path, prefix + child.name, child, protocol
            yield from _functions(path, child, f"{prefix}{child.name}.", False)
        elif isinstance(child, ast.ClassDef):
            declares = any(ast.unparse(base).split("[")[0].split(".")[-1] == "Protocol" for base in child.bases)
            yield from _functions(path, child, f"{prefix}{child.name}.", declares)
        else:
            yield from _functions(path, child, prefix, protocol)


def long_functions() -> dict[str, int]:
    """Functions of more than `LONG_FUNCTION` lines, decorators aside."""
    found = {}
    for path, name, node, _ in iterate_functions():
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > LONG_FUNCTION:
            found[f"{_relative_path(path)}:{name}"] = length
    return found


def one_word_names(package: str) -> tuple[list[str], int]:
    """Functions of `package` whose name is one word, and how many were asked.

    The rule: leading underscores aside, the name has no underscore. Left out are dunder methods, the names in
    `GIVEN_NAMES`, and methods that a Protocol of ours declares, wherever a class implements them.
    """
    everything = list(iterate_functions())
    declared = {node.name for *_, node, protocol in everything if protocol}
    asked, found = 0, []
    for path, name, node, protocol in everything:
        method = name.count(".") > 0
        given = node.name in GIVEN_NAMES or re.fullmatch(r"__\w+__", node.name)
        if _relative_path(path).split("/")[0] != package or given or protocol or (method and node.name in declared):
            continue
        asked += 1
        if "_" not in node.name.lstrip("_"):
            found.append(f"{_relative_path(path)}:{name}")
    return found, asked


def leave_out_short(called: Sequence[str]) -> list[str]:
    """Those of `called` (`file:name`) that take a reader somewhere.

    The rule: properties, dunder methods but `__call__`, and functions of one statement are short; docstring, imports
    and `del` of an argument are no statements. On the commit once counted by hand it gives the same 93 functions.
    """
    nodes = {f"{_relative_path(path)}:{name}": node for path, name, node, _ in iterate_functions()}
    return [name for name in called if not _is_short(nodes[name.replace(".<locals>", "")])]


def _is_short(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return True
    if re.fullmatch(r"__\w+__", node.name) and node.name != "__call__":
        return True
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    body = [one for one in body if not isinstance(one, ast.Delete | ast.Import | ast.ImportFrom)]
    return len(body) <= 1 and not any(
        isinstance(one, ast.For | ast.While | ast.If | ast.With | ast.Try) for one in body
    )


def loose_files() -> list[str]:
    """The .py files directly in `vlm_train/`; `__init__.py` is none."""
    return [path.name for path in sorted((ROOT / "vlm_train").glob("*.py")) if path.name != "__init__.py"]


def _relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def format_report(trace: bool = True, detail: bool = False) -> str:
    """All figures as lines of text, `detail`: with what was counted."""
    imports = read_imports()
    all_imports = {module: named | imports.typing_only[module] for module, named in imports.running.items()}
    lines: list[str] = []

    def add(title: str, figure: str, counted: Sequence[str] = ()) -> None:
        lines.append(f"{title:<58} {figure}")
        lines.extend(f"    {item}" for item in (counted if detail else ()))

    for title, graph in (("", imports.running), (", with those for typing only", all_imports)):
        for what, kind in (("files", graph), ("folders", folder_graph(graph))):
            found = find_cycles(kind)
            sizes = f" (of {', '.join(str(len(group)) for group in found)})" if found else ""
            add(f"import cycles between {what}{title}", f"{len(found)}{sizes}", [", ".join(group) for group in found])
    for package in PACKAGES:
        names, asked = one_word_names(package)
        add(f"one-word function names in {package}", f"{len(names) / asked:.0%} ({len(names)} of {asked})", names)
    if trace:
        called, with_reading = trace_step(ROOT, PACKAGES)
        for title, names in (
            ("from a shard's Sample to the loss", leave_out_short(called)),
            ("    and the reading of the shard", leave_out_short(with_reading)),
            ("    and the short ones", with_reading),
        ):
            files = {name.partition(":")[0] for name in names}
            add(title, f"{len(names)} functions in {len(files)} files", names)
    for title, lengths in (
        (f"files over {LONG_FILE} lines", long_files()),
        (f"functions over {LONG_FUNCTION} lines", long_functions()),
    ):
        add(title, str(len(lengths)), [f"{name} {length}" for name, length in lengths.items()])
    add("loose files in vlm_train/", str(len(loose_files())), loose_files())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures. Options: trace=false, detail=true."""
    arguments = sys.argv[1:] if argv is None else argv
    options = {"trace": True, "detail": False}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in options or value not in ("true", "false"):
            print(f"{argument}: allowed are trace=true|false and detail=true|false", file=sys.stderr)
            return 2
        options[name] = value == "true"
    print(format_report(**options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
