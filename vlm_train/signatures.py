"""What a `_target_` accepts, read from source without importing it, and whether a value fits an annotation."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

OURS = ("vlm_train", "data_pipelines")
"""Packages whose source is read; every other target has to be imported to be checked."""

Aliases = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor or factory."""

    name: str
    annotation: str | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """The named arguments of a target. `open` says that it takes further ones (`**kwargs`)."""

    parameters: dict[str, Parameter]
    open: bool = False
    aliases: Aliases = field(default=lambda name: None, compare=False)


class UnknownTarget(LookupError):
    """A `_target_` that names nothing, with a hint at what was meant."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely stands for."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` Did you mean x?`, or nothing."""
    near = nearest(name, known)
    return f" Did you mean {prefix}{near}?" if near else ""


def is_ours(target: str) -> bool:
    """Whether the source of `target` belongs to this project."""
    return target.split(".")[0] in OURS


@cache
def _loader() -> Any:
    import griffe

    return griffe.GriffeLoader(allow_inspection=False, search_paths=[Path(__file__).resolve().parent.parent])


@cache
def read_signature(target: str) -> Signature:
    """The signature of one of our own targets, from its source. Raises UnknownTarget."""
    import griffe

    package, *parts = target.split(".")
    found = _loader().load(package)
    for depth, part in enumerate(parts):
        if found.is_alias:
            found = found.final_target
        if part not in found.members:
            where = ".".join([package, *parts[:depth]])
            names = [name for name, member in found.members.items() if not name.startswith("_") and not member.is_alias]
            raise UnknownTarget(f"{where} has no '{part}'.{hint(part, names, where + '.')}")
        found = found.members[part]
    if found.is_alias:
        found = found.final_target
    if not (found.is_class or found.is_function):
        raise UnknownTarget(f"{target} is neither a class nor a function.")
    variadic = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)
    listed = [p for p in _parameters(found) if p.name not in ("self", "cls")]
    return Signature(
        {
            p.name: Parameter(p.name, None if p.annotation is None else str(p.annotation), p.default is None)
            for p in listed
            if p.kind not in variadic
        },
        open=any(p.kind is griffe.ParameterKind.var_keyword for p in listed),
        aliases=_aliases_of(found.module),
    )


def _parameters(found: Any) -> Iterable[Any]:
    """Arguments of a function, or of the constructor of a class, inherited ones included."""
    if found.is_function or "__init__" in found.all_members:
        return found.parameters if found.is_function else found.all_members["__init__"].parameters
    return found.parameters


def _aliases_of(module: Any) -> Aliases:
    """Type aliases of a module, such as `Mode = Literal["pad", "crop"]`."""

    def alias(name: str) -> str | None:
        member = module.members.get(name)
        if member is not None and member.is_alias and is_ours(member.target_path):
            member = member.final_target
        if member is None or member.is_alias or not member.is_attribute or member.value is None:
            return None
        return str(member.value)

    return alias


def import_signature(target: str) -> Signature:
    """The signature of a target of another package, which is imported. Raises UnknownTarget."""
    path, _, name = target.rpartition(".")
    try:
        found = importlib.import_module(path)
    except ImportError:
        outer, _, inner = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(outer), inner)
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownTarget(f"{target} cannot be imported: {error}") from error
    if not hasattr(found, name):
        raise UnknownTarget(f"{path} has no '{name}'.{hint(name, dir(found), path + '.')}")
    try:
        listed = inspect.signature(getattr(found, name)).parameters.values()
    except (TypeError, ValueError):
        return Signature({}, open=True)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return Signature(
        {p.name: Parameter(p.name, None, p.default is p.empty) for p in listed if p.kind not in variadic},
        open=any(p.kind is p.VAR_KEYWORD for p in listed),
    )


def fits(value: Any, annotation: str, aliases: Aliases = lambda name: None) -> bool:
    """Whether a YAML value fits an annotation. What cannot be judged (classes, type variables) fits."""
    try:
        node = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return True
    return _fits(value, node, aliases)


def _fits(value: Any, node: ast.expr, aliases: Aliases) -> bool:
    if isinstance(value, dict) and "_target_" in value:
        return True
    if isinstance(node, ast.Constant):
        return value is None if node.value is None else fits(value, str(node.value), aliases)
    if isinstance(node, ast.BinOp):
        return _fits(value, node.left, aliases) or _fits(value, node.right, aliases)
    if isinstance(node, ast.Subscript):
        return _fits_generic(value, _name(node.value), _arguments(node.slice), aliases)
    name = _name(node)
    if name in _SIMPLE:
        return _SIMPLE[name](value)
    meaning = aliases(name)
    return True if meaning is None else fits(value, meaning, aliases)


def _fits_generic(value: Any, name: str, arguments: list[ast.expr], aliases: Aliases) -> bool:
    if name == "Optional":
        return value is None or _fits(value, arguments[0], aliases)
    if name == "Union":
        return any(_fits(value, argument, aliases) for argument in arguments)
    if name == "Literal":
        return any(value == ast.literal_eval(a) and type(value) is type(ast.literal_eval(a)) for a in arguments)
    if name in ("list", "List", "Sequence", "Iterable", "set", "frozenset"):
        return isinstance(value, list) and all(_fits(item, arguments[0], aliases) for item in value)
    if name in ("tuple", "Tuple"):
        if len(arguments) == 2 and isinstance(arguments[1], ast.Constant) and arguments[1].value is ...:
            return isinstance(value, list) and all(_fits(item, arguments[0], aliases) for item in value)
        same_length = isinstance(value, list) and len(value) == len(arguments)
        return same_length and all(_fits(item, a, aliases) for item, a in zip(value, arguments, strict=True))
    if name in ("dict", "Dict", "Mapping", "MutableMapping"):
        return isinstance(value, dict) and all(_fits(item, arguments[-1], aliases) for item in value.values())
    return True


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _arguments(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def _is_number(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


_SIMPLE: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: _is_number(value, int),
    "float": lambda value: _is_number(value, (int, float)),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "Path": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
    "list": lambda value: isinstance(value, list),
    "tuple": lambda value: isinstance(value, list),
    "dict": lambda value: isinstance(value, dict),
}
