"""Files that a run reads back: each holds a checksum of its own values, so that a change of one is noticed.

What each holds, and how JSON is read back, is `schema`'s.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradientless.errors import UserError
from gradientless.inputs import read_text, toml
from gradientless.schema import checksum, require_seal, sealed
from gradientless.writing import write_atomically

_CODE = re.compile(r"^# sha256 of the code '(.*)': (\S+)$", re.MULTILINE)
_COMMENT = re.compile(r"^# sha256 of the values (?:above|below): (\S*)$", re.MULTILINE)


def sealed_toml(text: str, code: Mapping[str, str] | None = None) -> str:
    """TOML and the checksum of its values, in comments on both sides: what is cut off at one end leaves the other.

    code: name -> checksum, of the code that it names, in comments too."""
    told = checksum(toml(text, "config"))
    of_code = "".join(f"\n# sha256 of the code '{name}': {digest}" for name, digest in (code or {}).items())
    return f"# sha256 of the values below: {told}\n{text}{of_code}\n# sha256 of the values above: {told}\n"


def code_in_toml(path: Path) -> dict[str, str]:
    """The checksums of code that `sealed_toml` was given."""
    return dict(_CODE.findall(read_text(path, "run")))


def require_toml(path: Path) -> None:
    """Raises `UserError` for a file whose values are not those that `sealed_toml` was given, or that has none."""
    text = read_text(path, "run")
    values = toml(text, "run")
    if not values:
        raise UserError(f"run: {path.name} must hold what the run wrote, got an empty file in '{path.parent}'")
    for stated in _COMMENT.findall(text):
        require_seal("run", stated, values, path)


# --- writing -------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file for people and programs: without a checksum."""
    write_atomically(path, (json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is read back by `read_sealed`."""
    write_json(path, sealed(json.loads(json.dumps(finite(content)))))


def finite(value: Any) -> Any:
    """JSON knows no nan: a loss that ran away is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value
