"""What optimizers take: parameters in groups, and the conditions on options that several of them share, each with its
line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, Context
from typing import Any

import torch
from torch import Tensor, nn

from gradientless.errors import Faults, UserError, brief


def number(value: Any) -> float:
    """`value` as a float, for comparisons: not a number where it is none, infinite where it is too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def flags(owner: str, **values: Any) -> None:
    """Raise `UserError` unless each of `values` is true or false."""
    faults = Faults()
    for option, value in values.items():
        faults.require(isinstance(value, bool), f"{owner}: {option} must be True or False, got {brief(value)}")
    faults.tell()


def rate(owner: str, group: Mapping[str, Any], called: str = "radius") -> None:
    """Raise `UserError` unless a group's "lr", which users know as `called`, makes sense."""
    if not 0 < number(group["lr"]) < math.inf:
        told = f"{called} must be > 0 and finite for tensor '{group['names'][0]}', got {brief(group['lr'])}"
        raise UserError(f"{owner}: {told}")


def penalty(owner: str, group: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a group's norm penalty makes sense."""
    faults, weight = Faults(), group["penalty"]
    told = f"penalty must be >= 0 and finite for tensor '{group['names'][0]}', got {brief(weight)}"
    faults.require(0 <= number(weight) < math.inf, f"{owner}: {told}")
    with faults:
        flags(owner, squared=group["squared"])
    faults.tell()


def eps_is_felt(owner: str, eps: float, tensors: Iterable[Tensor], logged: bool = True) -> None:
    """Raise `UserError` for a probe of size `eps` that weights of the usual size round away: it must be one unit in
    their last place at the least. logged: of single precision where they have more, since logged losses have no more.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in filter(torch.is_floating_point, tensors):
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for dtype, those in by_dtype.items():
        wide = torch.promote_types(dtype, torch.float32)
        squares = sum(float(torch.linalg.vector_norm(t, dtype=wide)) ** 2 for t in those)
        size = math.sqrt(squares / max(1, sum(t.numel() for t in those)))
        least = max(torch.finfo(dtype).eps, torch.finfo(torch.float32 if logged else dtype).eps) * size
        if eps < least < math.inf:  # what is not finite is told at the first step
            enough = float(Context(2, ROUND_CEILING).create_decimal_from_float(least))  # as printed, not below it
            raise UserError(
                f"{owner}: eps must be >= {enough:.1e} for {str(dtype).removeprefix('torch.')} weights of size "
                f"{size:.2g} (root mean square), got {eps:g}; a smaller probe is rounded away"
                + (", since losses are logged in float32" if logged and dtype == torch.float64 else "")
            )


def check_whole_vector(owner: str, group: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a group's radius and norm penalty make sense."""
    faults = Faults()
    with faults:
        rate(owner, group)
    with faults:
        penalty(owner, group)
    faults.tell()


def named_groups(owner: str, params: Any, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups as torch takes them, each with the "names" of its tensors; without tensors that require no gradient.

    params: tensors, (name, tensor) pairs, or groups of them. Raises UserError for anything else."""
    items = _listed(owner, params)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    names: set[str] = set()
    count = 0
    ready = []
    for group in groups:
        if not isinstance(group, dict) or "params" not in group:
            raise UserError(f"{owner}: groups must be dicts with 'params', got {brief(group)}")
        strange = set(group) - set(defaults) - {"params", "names", "param_names", "initial_lr"}
        if strange:
            raise UserError(f"{owner}: group options must be among {sorted(defaults)}, got {sorted(strange, key=str)}")
        given = [group["params"]] if isinstance(group["params"], Tensor) else _listed(owner, group["params"])
        known = group.get("names") or group.get("param_names") or [f"param.{count + i}" for i in range(len(given))]
        if len(known) != len(given):
            raise UserError(f"{owner}: a group must name each of its {len(given)} params, got {len(known)} names")
        count += len(given)
        tensors, own = [], []
        for item, standing in zip(given, known, strict=True):
            pair = item if isinstance(item, tuple) else (standing, item)
            if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Tensor):
                found = type(pair[1] if len(pair) == 2 and isinstance(pair[0], str) else item).__name__
                raise UserError(f"{owner}: params must be tensors or (name, tensor) pairs, got {found}")
            name, tensor = pair
            if not tensor.requires_grad:
                continue
            if told := _unusable(tensor):
                raise UserError(f"{owner}: params must be {told} of '{name}'")
            if not tensor.is_leaf:
                raise UserError(f"{owner}: params must be leaf tensors, got '{name}', which was computed from others")
            if name in names:
                raise UserError(f"{owner}: parameter names must be distinct, got '{name}' twice")
            names.add(name)
            tensors.append(tensor)
            own.append(name)
        if tensors:
            ready.append({**group, "params": tensors, "names": own})
    if not ready:
        raise UserError(f"{owner}: params must hold at least one tensor that requires_grad, got none")
    return ready


def _unusable(tensor: Tensor) -> str | None:
    """What a tensor must be, and what it is, where nothing can be searched in it."""
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return "of a known shape, got the lazy parameter"
    if tensor.layout is not torch.strided:
        return f"dense, got the layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_floating_point() and tensor.element_size() < 2:
        return f"of float16, bfloat16, float32 or float64, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _listed(owner: str, given: Any) -> list[Any]:
    if isinstance(given, Tensor | dict | str | nn.Module) or not isinstance(given, Iterable):
        found = type(given).__name__
        raise UserError(f"{owner}: params must be tensors or (name, tensor) pairs, got {found}")
    return list(given)
