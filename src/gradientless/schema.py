"""Files that are read back: what each must hold, and the one reader of their JSON.

A checksum of its values, in the file itself, tells that it was changed: not of its bytes, so that one that was only
laid out anew is the same file. One without a checksum, as earlier versions wrote them, is read as it stands. A schema
tells that what a file holds can be used, whoever wrote it. It is

    str, bool, list, dict   a value of that kind
    float                   a number; whole ones are such
    Whole(least)            a whole number of at most 64 bits, from `least` on
    OneOf(values)           one of these texts
    [schema]                a list of such values
    {str: schema}           an object whose values all are such
    {"key": schema, …}      an object with these keys; it may hold others
    Maybe(schema)           such a value, of a key that need not be there
    Nullable(schema)        such a value, or null
    object                  anything
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gradientless.errors import UserError, brief
from gradientless.inputs import read_text

Schema = Any
SEALS = "seal", "sha256"  # the first key and the last: whatever takes one away leaves the other, or nothing


@dataclass(frozen=True)
class Maybe:
    of: Schema


@dataclass(frozen=True)
class Nullable:
    of: Schema


@dataclass(frozen=True)
class Whole:
    least: int = 0


@dataclass(frozen=True)
class OneOf:
    values: tuple[str, ...]


COUNT, POSITIVE = Whole(0), Whole(1)

_KINDS = {str: "a text", bool: "true or false", list: "a list", dict: "an object", float: "a number"}


def of_fields(kind: type) -> dict[str, Schema]:
    """The schema of what `dataclasses.asdict` makes of a data class: of its numbers, texts and tables of them. Whole
    numbers begin at -1, which stands for none; a field that has a default may be missing."""
    hints = get_type_hints(kind)
    found = {each.name: _of_hint(hints[each.name]) for each in fields(kind)}
    given = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}
    return {name: schema if name in given else Maybe(schema) for name, schema in found.items()}


def _of_hint(hint: Any) -> Schema:
    if hint is int:
        return Whole(-1)
    inner = get_args(hint)
    if get_origin(hint) is list:
        return [_of_hint(inner[0])]
    if len(inner) == 2 and inner[1] is type(None):
        return Nullable(_of_hint(inner[0]))
    if get_origin(hint) is dict and inner[0] is str:
        return {str: _of_hint(inner[1])}
    return hint if hint in _KINDS else object


def fits(owner: str, found: Any, schema: Schema) -> None:
    """Raise `UserError` unless the value `found` is as `schema` says."""
    if told := _misfit(found, schema, ""):
        raise UserError(f"{owner}: {told}")


def read_json(path: Path, owner: str, schema: Schema = object) -> Any:
    """What a JSON file holds. Raises `UserError` for one that is not there, not JSON, or not as `schema` says."""
    text = read_text(path, owner)
    try:
        found = json.loads(text)
    except RecursionError:
        raise UserError(f"{owner}: {path.name} must be JSON, got values nested too deeply in '{path.parent}'") from None
    except ValueError:  # also Python's own, of numbers of thousands of digits
        raise UserError(f"{owner}: {path.name} must be JSON, got a corrupted file in '{path.parent}'") from None
    fits(f"{owner}: {path.name} in '{path.parent}'", found, schema)
    return found


def _misfit(found: Any, schema: Schema, place: str) -> str | None:
    """What is wrong with a value, behind its place in the file; None where nothing is."""
    if isinstance(schema, Maybe):
        return _misfit(found, schema.of, place)
    if isinstance(schema, Nullable):
        return None if found is None else _misfit(found, schema.of, place)
    if isinstance(schema, Mapping):
        return _misfit_of_object(found, schema, place)
    if isinstance(schema, list):
        if not isinstance(found, list):
            return _told(place, "a list", found)
        parts = ((f"{place}[{i}]", each, schema[0]) for i, each in enumerate(found))
    elif isinstance(schema, Whole):
        holds = type(found) is int and schema.least <= found < 2**63
        return None if holds else _told(place, f"a whole number >= {schema.least}", found)
    elif isinstance(schema, OneOf):
        holds = isinstance(found, str) and found in schema.values
        return None if holds else _told(place, f"one of {', '.join(schema.values)}", found)
    elif schema is float:
        holds = type(found) is float or (type(found) is int and abs(found) < 2**63)
        return None if holds else _told(place, _KINDS[float], found)
    else:
        return None if schema is object or isinstance(found, schema) else _told(place, _KINDS[schema], found)
    return next((told for at, each, inner in parts if (told := _misfit(each, inner, at))), None)


def _misfit_of_object(found: Any, schema: Mapping[Any, Schema], place: str) -> str | None:
    if not isinstance(found, dict):
        return _told(place, "an object", found)
    if str in schema:
        schema = dict.fromkeys(found, schema[str])
    for key, inner in schema.items():
        at = f"{place}.{key}" if place else str(key)
        if key not in found:
            if not isinstance(inner, Maybe):
                return f"{at} must be there, got none"
        elif told := _misfit(found[key], inner, at):
            return told
    return None


def _told(place: str, wanted: str, found: Any) -> str:
    return f"{place or 'it'} must be {wanted}, got {brief(found)}"


# --- seals ---------------------------------------------------------------------------------------------------------


def checksum(values: Any) -> str:
    """sha256, in hex, of JSON-able values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` between their checksums."""
    first, last = SEALS
    return {first: checksum(values), **values, last: checksum(values)}


def unsealed(owner: str, found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of what `sealed` gave. Raises `UserError` when they are others."""
    values = {key: value for key, value in found.items() if key not in SEALS}
    for key in SEALS:
        require_seal(owner, found.get(key), values, path)
    return values


def require_seal(owner: str, stated: Any, values: Any, path: Path) -> None:
    """Raise `UserError` where a checksum is stated and `values`, read from the file `path`, have another."""
    if stated is not None and stated != checksum(values):
        raise UserError(f"{owner}: {path.name} must hold what the run wrote, got a changed file in '{path.parent}'")


def read_sealed(path: Path, owner: str, schema: Schema = dict) -> dict[str, Any]:
    """As `read_json`, of a file that may hold a checksum of the rest, which is left out of what is returned."""
    values = unsealed(owner, read_json(path, owner, dict), path)
    fits(f"{owner}: {path.name} in '{path.parent}'", values, schema)
    return values
