"""What one check found, and the checks that modules of every kind share."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Largest difference that two ways of computing the same may have, relative to the largest number."""

PICKLE_BYTES = 2000
"""Most bytes of what data workers are sent: more would be weights."""


@dataclass(frozen=True)
class Finding:
    """What was checked, and what is wrong with it; "" if nothing is."""

    checked: str
    problem: str = ""

    def __str__(self) -> str:
        return f"  FAIL  {self.checked}: {self.problem}" if self.problem else f"  ok    {self.checked}"


def compare_values(checked: str, got: Any, wanted: Any) -> Finding:
    """Both are equal."""
    return Finding(checked, "" if got == wanted else f"got {got}, wanted {wanted}")


def compare_tensors(checked: str, got: Tensor, wanted: Tensor) -> Finding:
    """Both are the same numbers, up to `TOLERANCE`."""
    if got.shape != wanted.shape:
        return Finding(checked, f"got {list(got.shape)}, wanted {list(wanted.shape)}")
    with torch.no_grad():
        difference, scale = (float(one.abs().max()) if one.numel() else 0.0 for one in (got - wanted, wanted))
    same = difference <= TOLERANCE * scale + 1e-12
    return Finding(checked, "" if same else f"differs by {difference:.1e}, where the largest number is {scale:.1e}")


def require_members(part: Any, names: Iterable[str]) -> Finding:
    """The attributes and methods of a contract are there."""
    missing = [name for name in names if not hasattr(part, name)]
    what = f"{type(part).__name__} has no {', '.join(missing)}" if missing else ""
    return Finding("has the attributes and methods of its contract", what)


def check_pickle(checked: str, value: Any) -> Finding:
    """Data workers can be sent `value`, and it takes no weights with it."""
    try:
        size = len(pickle.dumps(value))
    except Exception as error:  # pickle raises whatever an object's own code does
        advice = "Use a function of a module, or functools.partial of one."
        return Finding(checked, f"does not pickle: {type(error).__name__}: {error}. {advice}")
    heavy = f"pickles to {size} bytes, wanted at most {PICKLE_BYTES}: it seems to hold weights"
    return Finding(checked, heavy if size > PICKLE_BYTES else "")


def check_on_meta(module: nn.Module) -> Finding:
    """A module that was built on the meta device has no memory for weights."""
    real = [name for name, parameter in module.named_parameters() if not parameter.is_meta]
    problem = f"{', '.join(real[:3])} has values all the same; make it without naming a device" if real else ""
    size = sum(parameter.numel() for parameter in module.parameters())
    return Finding(f"builds on the meta device ({size:,} parameters)", problem)


def check_gradients(module: nn.Module, loss: Tensor, unused: Collection[str] = ()) -> Finding:
    """After backward every parameter has a finite gradient, but those that are declared unused, which have none."""
    module.zero_grad()
    loss.backward()
    problems = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in unused and parameter.grad is not None:
            problems.append(f"{name} is declared unused, but gets a gradient")
        elif name not in unused and parameter.grad is None:
            problems.append(f"{name} gets none and is not declared as unused")
        elif parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            problems.append(f"{name} gets one that is not finite")
    unknown = sorted(set(unused) - {name for name, _ in module.named_parameters()})
    problems += [f"{name} is declared unused, but is no parameter" for name in unknown]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return Finding("every parameter gets a gradient, but those declared unused", "; ".join(problems[:3]) + more)


def check_state(module: nn.Module, other: nn.Module, compute: Callable[[Any], Tensor]) -> Finding:
    """`other`, made anew, computes what `module` does once it has read its saved weights."""
    checked = "a copy that loads its state_dict computes the same"
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        return compare_tensors(checked, compute(other.eval()), compute(module.eval()))


def weigh_values(values: Tensor) -> Tensor:
    """A loss, `[]`, to which every value adds another random share."""
    generator = torch.Generator().manual_seed(0)
    return (values * torch.randn(values.shape, generator=generator)).sum()
