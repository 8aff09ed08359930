"""What a `_target_` accepts, read from source without importing it, and whether a value fits an annotation."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from hydra._internal.utils import _locate

from data_pipelines.nearest import did_you_mean
from data_pipelines.value_types import fits_type

OURS = ("vlm_train", "data_pipelines")
"""Packages whose source is read; every other target has to be imported to be checked."""

ROOT = Path(__file__).resolve().parents[2]

Aliases = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor or factory."""

    name: str
    annotation: str | None
    required: bool
    default: str | None = None  # as written in the source


@dataclass(frozen=True)
class Signature:
    """The named arguments of a target. `open` says that it takes further ones (`**kwargs`)."""

    parameters: dict[str, Parameter]
    open: bool = False
    aliases: Aliases = field(default=lambda name: None, compare=False)


class UnknownTarget(LookupError):
    """A `_target_` that names nothing, with a hint at what was meant."""


def is_ours(target: str) -> bool:
    """Whether the source of `target` belongs to this project."""
    return target.split(".")[0] in OURS


@cache
def _parse_module(name: str) -> Any:
    """The parsed source of one of our modules, alone: reading whole packages would take a second."""
    import griffe

    base = ROOT / Path(*name.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return griffe.visit(name, filepath=path, code=path.read_text(encoding="utf-8"))


def find_target(target: str) -> Any:
    """The class, function or value that a dotted path names, imports followed. Raises UnknownTarget."""
    where, _, name = target.rpartition(".")
    if not _is_module(where):
        package, _, missing = where.rpartition(".")
        raise UnknownTarget(
            f"{package} has no '{missing}'.{did_you_mean(missing, _list_submodules(package), package + '.')}"
        )
    members = _parse_module(where).members
    if name not in members:
        names = [known for known, member in members.items() if not known.startswith("_") and not member.is_alias]
        raise UnknownTarget(
            f"{where} has no '{name}'.{did_you_mean(name, [*names, *_list_submodules(where)], where + '.')}"
        )
    found = members[name]
    return find_target(found.target_path) if found.is_alias and is_ours(found.target_path) else found


def _list_submodules(package: str) -> list[str]:
    folder = ROOT / Path(*package.split("."))
    return [path.stem for path in folder.iterdir() if _is_module(f"{package}.{path.stem}")] if folder.is_dir() else []


def _is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@cache
def read_signature(target: str) -> Signature:
    """The signature of one of our own targets, from its source. Raises UnknownTarget."""
    import griffe

    found = find_target(target)
    if found.is_alias or not (found.is_class or found.is_function):
        raise UnknownTarget(f"{target} is neither a class nor a function of ours.")
    variadic = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)
    listed = [p for p in _list_parameters(found) if p.name not in ("self", "cls")]
    return Signature(
        {
            p.name: Parameter(
                p.name,
                None if p.annotation is None else str(p.annotation),
                p.default is None,
                None if p.default is None else str(p.default),
            )
            for p in listed
            if p.kind not in variadic
        },
        open=any(p.kind is griffe.ParameterKind.var_keyword for p in listed),
        aliases=_aliases_of(found.module),
    )


def _list_parameters(found: Any) -> list[Any]:
    """Arguments of a function, or of the constructor of a class: its own, its dataclass's, or a base's."""
    if found.is_function:
        return list(found.parameters)
    if "__init__" in found.members:
        return list(found.members["__init__"].parameters)
    if any(decorator.callable_path == "dataclasses.dataclass" for decorator in found.decorators):
        return _dataclass_fields(found)
    for base in found.bases:
        path = base if isinstance(base, str) else base.canonical_path
        if is_ours(path):
            return _list_parameters(find_target(path))
    return []


def _dataclass_fields(found: Any) -> list[Any]:
    """The fields of a dataclass as arguments."""
    import griffe

    keyword = griffe.ParameterKind.positional_or_keyword
    fields = [member for member in found.members.values() if member.is_attribute and member.annotation is not None]
    return [griffe.Parameter(f.name, annotation=f.annotation, kind=keyword, default=f.value) for f in fields]


def _aliases_of(module: Any) -> Aliases:
    """Type aliases of a module, such as `Mode = Literal["pad", "crop"]`."""

    def alias_value(name: str) -> str | None:
        member = module.members.get(name)
        if member is not None and member.is_alias and is_ours(member.target_path):
            member = find_target(member.target_path)
        if member is None or member.is_alias or not member.is_attribute or member.value is None:
            return None
        return str(member.value)

    return alias_value


def import_target(target: str) -> Any:
    """What a target of another package names: an attribute of a module, or of a class in one. Raises UnknownTarget.

    Modules are only found by importing them, so no name reaches what a module has imported for itself from elsewhere.
    """
    path, _, name = target.rpartition(".")
    try:
        outer = importlib.import_module(path)
    except (ImportError, ValueError) as first:
        needs_more = isinstance(first, ImportError) and not f"{path}.".startswith(f"{first.name}.")
        if needs_more or type(first) is ImportError:  # the module is there
            raise UnknownTarget(f"{target} cannot be imported: {first}") from first
        module, _, inner = path.rpartition(".")
        try:
            outer = getattr(importlib.import_module(module), inner)
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownTarget(f"{target} cannot be imported: {error}") from error
        if inspect.ismodule(outer):
            raise UnknownTarget(f"{path} is not a module of its own: name {outer.__name__}.{name}.") from None
    if not hasattr(outer, name):
        raise UnknownTarget(f"{path} has no '{name}'.{did_you_mean(name, dir(outer), path + '.')}")
    found = getattr(outer, name)
    if inspect.ismodule(found) or _locate(target) is not found:  # what Hydra is going to call
        raise UnknownTarget(f"{target} is a module, or hidden by something else of that name.")
    return found


def import_signature(target: str) -> Signature:
    """The signature of a target of another package, which is imported. Raises UnknownTarget."""
    try:
        listed = inspect.signature(import_target(target)).parameters.values()
    except (TypeError, ValueError):
        return Signature({}, open=True)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return Signature(
        {p.name: Parameter(p.name, None, p.default is p.empty) for p in listed if p.kind not in variadic},
        open=any(p.kind is p.VAR_KEYWORD for p in listed),
    )


def read_attribute(target: str, name: str) -> Any:
    """What the class `target` says as its attribute `name`, its bases included. Ours say it as a literal, which is read
    from the source; other packages are imported.

    Raises:
        UnknownTarget: there is no such target.
        AttributeError: the class does not say it.
    """
    if not is_ours(target):
        return getattr(import_target(target), name)
    found = find_target(target)
    if name in found.members:
        return ast.literal_eval(str(found.members[name].value))
    for base in getattr(found, "bases", ()):
        path = base if isinstance(base, str) else base.canonical_path
        if is_ours(path):
            with suppress(AttributeError):
                return read_attribute(path, name)
    raise AttributeError(f"{target} has no {name}", name=name)


def fits_annotation(value: Any, annotation: str, aliases: Aliases = lambda name: None) -> bool:
    """Whether a YAML value fits an annotation. A component, and what has a type unknown here, such as a class, fits."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    return fits_type(value, _read_type(annotation, aliases))


def _read_type(annotation: str, aliases: Aliases) -> Any:
    """The type that an annotation in source text means, with `Any` for every name unknown here."""

    def type_of(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return _read_type(node.value, aliases) if isinstance(node.value, str) else node.value
        if isinstance(node, ast.BinOp):
            return Union[type_of(node.left), type_of(node.right)]  # noqa: UP007 (`None | None` is no type)
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if not isinstance(node, ast.Subscript):
            meaning = None if name in _TYPES else aliases(name)
            return _TYPES.get(name, Any) if meaning is None else _read_type(meaning, aliases)
        outer = type_of(node.value)
        if outer is Any:
            return Any
        if outer is Literal:
            return Literal[ast.literal_eval(node.slice)]
        arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return outer[tuple(type_of(argument) for argument in arguments)]

    try:
        return type_of(ast.parse(annotation, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):  # no annotation of a value
        return Any


_TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "float": float, "str": str, "Path": Path, "None": None, "Literal": Literal,
    "Optional": Optional, "Union": Union, "list": list, "List": list, "Sequence": list, "Iterable": list, "set": set,
    "frozenset": frozenset, "tuple": tuple, "Tuple": tuple, "dict": dict, "Dict": dict, "Mapping": dict,
    "MutableMapping": dict,
}  # fmt: skip
"""Name in an annotation -> type of a YAML value."""
