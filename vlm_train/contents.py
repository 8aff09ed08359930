"""What a class or module of ours contains, read from source without importing it."""

from __future__ import annotations

import ast
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_train.signatures import find, is_ours


def members(target: str) -> set[str]:
    """Names of what a class of ours has: methods and attributes, those of its bases of ours too."""
    found = find(target)
    names = set(found.members)
    for base in found.bases:
        path = base if isinstance(base, str) else base.canonical_path
        if is_ours(path):
            names |= members(path)
    return names


def constant(target: str, name: str) -> Any:
    """The value of a class attribute, of the class or a base of ours; None where none is written as a literal."""
    found = find(target)
    if name in found.members:
        with suppress(ValueError, AttributeError):
            return ast.literal_eval(str(found.members[name].value))
        return None
    paths = [base if isinstance(base, str) else base.canonical_path for base in found.bases]
    return next((constant(path, name) for path in paths if is_ours(path)), None)


def uses(target: str, argument: str) -> set[str]:
    """What the module of a target of ours asks of `argument`: names of its attributes; `forward` where it is called."""
    path = Path(find(target).filepath)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and _is_name(node.value, argument):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and _is_name(node.func, argument):
            names.add("forward")
    return names


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
