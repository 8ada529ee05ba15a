"""The matrix: every architecture of `tiny_architectures` on every surface, by the checks of `checks`, as a table.

    python tests/architectures/matrix.py [--only NAME …] [--checks …] [--surfaces …] [--out FILE] [--again]

Each architecture is examined in a process of its own with a time limit. What it came to is kept under build/, so that a
run that was stopped goes on where it was; a change of the code or of a package makes all of it anew, as --again does.
Exit 1 where any cell is a FAULT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "language"))  # the tokenizers of the tests

import peft  # noqa: F401 (here once, not in every process)
import torch
import transformers
from checks import ALONE, CHECKS, FAULT, LIMIT, OK, REFUSED, TRIED, Outcome, Subject, applies, outcomes
from tiny_architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # that one architecture may take
KEPT = ROOT / "build" / "architectures"
Row = dict[str, dict[str, Outcome]]  # surface -> check -> what came of it


def examine(name: str, surfaces: list[str], checks: list[str], file: Path) -> None:
    """All cells of one architecture, written to `file` after each surface."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(ARCHITECTURES[name], Path(folder))
        for tried in surfaces:
            mine = [check for check in checks if applies(subject.architecture, tried, check)]
            row[tried] = outcomes(subject, tried, mine)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(row), "utf-8")
            os.replace(partial, file)


def read(file: Path) -> Row:
    rows = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {tried: {check: Outcome(*each) for check, each in cells.items()} for tried, cells in rows.items()}


def row_of(name: str, surfaces: list[str], checks: list[str], file: Path) -> Row:
    """`examine` in a process of its own; what it did not come to in time is a FAULT."""
    # A fork has everything imported already.
    way = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    process = multiprocessing.get_context(way).Process(target=examine, args=(name, surfaces, checks, file))
    process.start()
    process.join(SECONDS)
    ended = f"it ended with code {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
        ended = f"it did not end within {SECONDS} s"
    row = read(file)
    for tried in surfaces:
        mine = [check for check in checks if applies(ARCHITECTURES[name], tried, check)]
        row.setdefault(tried, dict.fromkeys(mine, Outcome(FAULT, ended)))
    return row


def code() -> str:
    """A checksum of all that decides the outcomes."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {sys.version}".encode())
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests" / "architectures").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Notes:
    """Footnotes, each line once."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}

    def mark(self, line: str, name: str) -> str:
        line = line.replace(f"'{ARCHITECTURES[name].model_type}'", "…")
        line = re.sub(r"'?/model\d+'?", "the model", re.sub(r"; did you mean '[^']*'\?", ".", line))
        return f"[{self.lines.setdefault(line, len(self.lines) + 1)}]"


def cell(name: str, outcomes: dict[str, Outcome], notes: Notes) -> str:
    """One surface's outcomes in a few words: what is not said to be otherwise is ok."""
    if not outcomes:
        return "–"
    groups: dict[Outcome, list[str]] = {}
    for check, each in outcomes.items():
        groups.setdefault(each, []).append(check)
    said = []
    for each, checks in groups.items():
        if each.word != OK:
            what = "" if len(checks) == len(outcomes) else ", ".join(checks) + " "
            said.append(f"{what}{each.word}{notes.mark(each.line, name) if each.line else ''}")
    return "; ".join(said) or OK


HEAD = """# Architectures

Which surfaces work with which architectures: tiny random models, made from the library's configurations, and the same
checks on each. Made by `make matrix` with torch {torch} and transformers {transformers}; {count} architectures.

{checks}

A surface's cell tells the checks that are not *ok*:

- *one at a time*: injection cannot tell the points of one batch apart in this architecture, so each takes a pass of its
  own; the losses are right.
- *refused*: one line says why, which stands below the table.
- *the library's limit*: plain transformers (or peft), tried in the same way, has the trouble itself.
- *FAULT*: a crash, or a wrong result. There must be none.

`full, head` is the surface `full` under a classification head. Heads say no choices or texts, and masked models write
none.

"""


def table(rows: dict[str, Row], surfaces: list[str], left_out: list[str]) -> str:
    notes = Notes()
    told = "\n".join(f"- **{name}**: {' '.join((check.__doc__ or '').split())}" for name, check in CHECKS.items())
    lines = [HEAD.format(torch=torch.__version__.partition("+")[0], transformers=transformers.__version__,
                         count=len(rows), checks=told)]  # fmt: skip
    lines += [f"| architecture | {' | '.join(surfaces)} |\n", "|---" * (len(surfaces) + 1) + "|\n"]
    for name, row in rows.items():
        cells = [cell(name, row.get(tried, {}), notes) for tried in surfaces]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    lines.append("\n" + "\n".join(f"{number}. {line}" for line, number in notes.lines.items()) + "\n")
    if left_out:
        lines.append(f"\nNot in this version of the library: {', '.join(left_out)}.\n")
    return "".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="matrix.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--checks", nargs="+", metavar="CHECK", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--surfaces", nargs="+", metavar="SURFACE", choices=list(TRIED), default=list(TRIED))
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--again", action="store_true", help="keep nothing of an earlier run")
    asked: Any = parser.parse_args(argv)
    part = hashlib.sha256(repr((asked.checks, asked.surfaces)).encode()).hexdigest()[:8]
    folder, rows, counts = KEPT / f"{code()}-{part}", {}, Counter()
    folder.mkdir(parents=True, exist_ok=True)
    left_out = [name for name in asked.only if not ARCHITECTURES[name].known]
    for name in asked.only:
        if name in left_out:
            continue
        file, begin = folder / f"{re.sub(r'[^a-z0-9_-]+', '-', name)}.json", time.monotonic()
        if asked.again:
            file.unlink(missing_ok=True)
        done = read(file)
        rows[name] = done if set(asked.surfaces) <= set(done) else row_of(name, asked.surfaces, asked.checks, file)
        found = {(t, c): each for t, cells in rows[name].items() for c, each in cells.items()}
        counts.update(each.word for each in found.values())
        mine = Counter(each.word for each in found.values())
        words = ", ".join(f"{mine[word]} {word}" for word in (OK, ALONE, REFUSED, LIMIT, FAULT) if mine[word])
        print(f"{name}: {words} ({time.monotonic() - begin:.0f} s)", flush=True)
        for (tried, check), each in found.items():
            if each.word == FAULT:
                print(f"  FAULT {tried} | {check}: {each.line}", flush=True)
    if left_out:
        print("not in this version of the library:", ", ".join(left_out))
    print(", ".join(f"{counts[word]} {word}" for word in (OK, ALONE, REFUSED, LIMIT, FAULT)))
    if asked.out:
        asked.out.write_text(table(rows, asked.surfaces, left_out), "utf-8")
    return 1 if counts[FAULT] else 0


if __name__ == "__main__":
    sys.exit(main())
