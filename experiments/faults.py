"""The table of faults: what happens to runs that are killed, meet another process, a full or a lost disk, or damage.

    python experiments/faults.py --out experiments/results/faults.md    # all of it
    python experiments/faults.py --every 10 --damages 30                # a part, to see that nothing is broken

Tiny random models, in processes that are forked from one that has imported everything; needs Linux or macOS, and no
network. Ends with code 1 where anything was lost or wrong. What is drawn in plot.png is left out, and what is written
is not forced onto the disk: neither decides what another process finds.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import hashlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach for the network
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests" / "language"))

import families
import torch

import damage
import forked
import tiny_run
from forked import Ended, Watch, halt, kill
from gradientless.errors import with_kind
from gradientless.run import report
from gradientless.writing import write_atomically

SHORT = ("evaluate_every=2", "checkpoint_every=2", "log_every=2")
STAGED = """
steps = 2
[[stages]]
surface.name = "full"
optimizer = {name = "mezo", lr = 1e-3}
[[stages]]
surface = {name = "lst", reduction = 4}
optimizer = {name = "adamw", lr = 1e-2}
"""
LINE = re.compile(r"\S.*: .*\b(must|needs|could not|not found)\b.*, got|\S.*: could not")
"""What a line that tells of a fault looks like: owner, requirement, what there was."""

Arguments = Callable[[Path], list[str]]


@dataclass
class Row:
    what: str
    times: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, end: str, wrong: str | None = None) -> None:
        self.times += 1
        if wrong is None:
            self.ends[end] = self.ends.get(end, 0) + 1
        else:
            self.wrong.append(wrong)
            print(f"    {wrong}", file=sys.stderr, flush=True)


class Table:
    """Runs in `place`; every: of how many moments one is taken; damages: how many of each file."""

    def __init__(self, place: Path, every: int, damages: int) -> None:
        self.place, self.every, self.damages = place, every, damages
        self.rows: list[Row] = []
        self.run = place / "run"
        model, rows = tiny_run.make_model(place / "model"), tiny_run.write_table(place / "rows.csv", 30)
        masked = families.save("bert", place / "masked")
        (place / "staged.toml").write_text(STAGED, "utf-8")
        full = ("--surface", "full", "surface.readout=head", "optimizer.lr=1e-3")
        staged = ["train", str(place / "staged.toml"), f"data.path={rows}", f"model={masked}", "surface.readout=head"]
        staged += ["data.max_length=16", "batch_size=8", "device=cpu", *SHORT, "--out"]
        self.runs: dict[str, Arguments] = {
            "GLD on a head": lambda out: tiny_run.arguments(
                model, rows, out, *SHORT, "optimizer.radius=0.1", steps=5, optimizer="gld"
            ),
            "MeZO on all weights": lambda out: tiny_run.arguments(
                masked, rows, out, *SHORT, *full, steps=3, optimizer="mezo"
            ),
            "MeZO, then a ladder": lambda out: [*staged, str(out)],
        }
        self.rows_file = rows
        self._straight: dict[str, dict[str, str]] = {}

    def straight(self, name: str) -> dict[str, str]:
        """The bits of the run that nothing befalls. It is in this process, which so imports and compiles all that the
        forked ones need."""
        if name not in self._straight:
            out = self.run.parent / name
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                for command in (self.runs[name](out), *self.readers(out).values()):
                    assert tiny_run.gradientless(*command) == 0, command
            self._straight[name] = bits(out)
            gc.collect()
            gc.freeze()
        return self._straight[name]

    def readers(self, run: Path) -> dict[str, list[str]]:
        exported = run.parent / "exported"
        shutil.rmtree(exported, ignore_errors=True)
        return {
            "replay": ["replay", str(run)],
            "eval": ["eval", str(run), "--data", self.rows_file],
            "export": ["export", str(run), "--out", str(exported)],
            "predict": ["predict", str(run), "a good film"],
        }

    def row(self, what: str) -> Row:
        self.rows.append(Row(what))
        print(what, file=sys.stderr, flush=True)
        return self.rows[-1]

    def fresh(self) -> Path:
        shutil.rmtree(self.run, ignore_errors=True)
        return self.run

    def moments(self, name: str, at_least: int = 1) -> range:
        """Those of the run."""
        self.straight(name)
        ended = forked.run(self.runs[name](self.fresh()), Watch())
        assert ended.code == 0, ended.told
        return range(1, int(ended.lines[-1].split()[-1]) + 1, max(self.every, at_least))

    def resumed(self, name: str) -> str | None:
        """What is wrong with the run after it was gone on with; None where it has the bits of the one that nothing
        befell."""
        run = self.run
        ended = forked.run([*self.runs[name](run), "--resume"], None, ["replay", str(run)])
        if ended.code or "Traceback" in ended.told:
            return f"resume ended with {ended.code}: {ended.lines[-1]}"
        said = re.findall(r"bit-equal to the run +(\w+)", ended.told)
        if not said or set(said) != {"yes"}:
            return f"replay said {said}"
        return self.others(name)

    def others(self, name: str) -> str | None:
        run = self.run
        found, wanted = bits(run), self.straight(name)
        if found != wanted:
            names = sorted(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
            return f"other bits in {', '.join(names)}"
        left = [
            path.name for path in run.rglob("*") if re.search(r"\.partial$|-superseded$|^\.lock$|^\.tmp", path.name)
        ]
        return f"left behind: {', '.join(left)}" if left else None

    # --- kills -----------------------------------------------------------------------------------------------------

    def kills(self, name: str) -> None:
        row = self.row(f"{name}: killed (SIGKILL) at every operation on files, and half way through every write")
        for at in self.moments(name):
            killed = forked.run(self.runs[name](self.fresh()), Watch(at, kill))
            if killed.code != -signal.SIGKILL:
                row.add("", f"moment {at}: ended with {killed.code}")
                continue
            begun = (self.run / "config.toml").exists()
            wrong = self.resumed(name)
            row.add("gone on with" if begun else "begun anew", wrong and f"moment {at}: {wrong}")

    def kills_again(self, name: str) -> None:
        row = self.row(f"{name}: killed half way, and again at every operation of the run that goes on")
        half = self.run.parent / "half"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(self.halfway(name), half)
        again = [*self.runs[name](self.run), "--resume"]
        at = 1
        while True:
            shutil.rmtree(self.run)
            shutil.copytree(half, self.run)
            if forked.run(again, Watch(at, kill)).code == 0:
                return
            wrong = self.resumed(name)
            row.add("gone on with", wrong and f"moment {at}: {wrong}")
            at += self.every

    def halfway(self, name: str) -> Path:
        """The folder of a run that was killed half way."""
        middle = self.moments(name)[-1] // 2
        forked.run(self.runs[name](self.fresh()), Watch(middle, kill))
        return self.run

    # --- disks -----------------------------------------------------------------------------------------------------

    def met(self, row: Row, name: str, at: str, ended: Ended) -> None:
        """A run that met a fault of its disk, which is gone now."""
        wrong = (None if ended.code == 0 else no_line(ended)) or self.resumed(name)
        row.add("one line, gone on with" if ended.code else "ended all the same", wrong and f"{at}: {wrong}")

    def fails(self, name: str, number: int, title: str, once: bool = False, at_least: int = 1) -> None:
        share = "" if at_least == 1 else f", of which one in {at_least} is taken"
        row = self.row(f"{name}: {title}{share}")
        for at in self.moments(name, at_least):
            ended = forked.run(self.runs[name](self.fresh()), Watch(at, number=number, once=once))
            self.met(row, name, f"moment {at}", ended)

    def limited(self, name: str) -> None:
        row = self.row(f"{name}: no file may grow beyond a number of bytes (RLIMIT_FSIZE), from 0 on")
        arguments = self.runs[name]
        for limit in range(0, 3000, 100 * self.every):

            def cap(limit: int = limit) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            ended = forked.run(arguments(self.fresh()), Watch(1, cap, once=True))
            self.met(row, name, f"{limit} bytes", ended)

    def small_disk(self, name: str) -> None:
        disk = self.place / "disk"
        disk.mkdir(exist_ok=True)
        what = f"{name}: a file system of so few pages that it gets full, then larger"
        if mount(["-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]):
            self.row(f"{what} (not done: this machine does not let it be mounted)")
            return
        row, whole, self.run = self.row(what), self.run, disk / "run"
        try:
            for pages in range(1, 60, self.every):
                self.fresh()
                mount(["-o", f"remount,size={4 * pages}k", str(disk)])
                ended = forked.run(self.runs[name](self.run))
                mount(["-o", "remount,size=64m", str(disk)])
                self.met(row, name, f"{pages} pages", ended)
            self.fresh()
            row = self.row(f"{name}: a file system that is mounted read-only")
            mount(["-o", "remount,ro", str(disk)])
            ended = forked.run(self.runs[name](self.run))
            mount(["-o", "remount,rw", str(disk)])
            self.met(row, name, "from the start", ended)
        finally:
            self.run = whole
            subprocess.run(["umount", str(disk)], check=True)

    def vanishes(self, name: str) -> None:
        row = self.row(f"{name}: the run folder is removed at every operation on files")
        for at in self.moments(name):
            self.fresh()
            watch = Watch(at, lambda: shutil.rmtree(self.run, ignore_errors=True), once=True)
            ended = forked.run(self.runs[name](self.run), watch)
            if ended.code == 0 and not self.run.exists():
                row.add("it had ended")
            else:
                self.met(row, name, f"moment {at}", ended)

    # --- two processes ---------------------------------------------------------------------------------------------

    def second(self, name: str) -> None:
        row = self.row(f"{name}: a second process goes on with the run while the first one stands at an operation")
        for at in self.moments(name, 3):
            process = forked.start(self.runs[name](self.fresh()), Watch(at, halt))
            if not process.halted():
                row.add("", f"moment {at}: did not halt")
                continue
            other = forked.run([*self.runs[name](self.run), "--resume"])
            os.kill(process.number, signal.SIGCONT)
            first = process.end()
            refused = f"which process {process.number} on {socket.gethostname()} writes to"
            if other.code == 2 and first.code == 0:
                named = refused in other.lines[-1] or "which another process writes to" in other.lines[-1]
                wrong = no_line(other) or (None if named else f"refused by '{other.lines[-1]}'")
                end = "the second is refused with the first's id and host"
            elif other.code == 0 and first.code in (0, 2):  # before the first has the lock, or after it gave it back
                wrong, end = no_line(first) if first.code else None, "both in turn"
            else:
                wrong, end = f"ended with {first.code} and {other.code}: {other.lines[-1]}", ""
            wrong = wrong or self.others(name)
            row.add(end, wrong and f"moment {at}: {wrong}")

    def reading(self, name: str) -> None:
        row = self.row(f"{name}: replay, eval, export and predict while a process stands at an operation")
        for at in self.moments(name, 10):
            process = forked.start(self.runs[name](self.fresh()), Watch(at, halt))
            assert process.halted()
            for command, arguments in self.readers(self.run).items():
                before = content(self.run)
                ended = forked.run(arguments)
                wrong = None if ended.code == 0 else no_line(ended)
                if before != content(self.run) and (self.run / ".lock").exists():
                    wrong = "the run folder was written to"
                row.add("an answer" if ended.code == 0 else "one line", wrong and f"{command} at {at}: {wrong}")
                shutil.rmtree(self.run / "replayed", ignore_errors=True)
            os.kill(process.number, signal.SIGCONT)
            first = process.end()
            wrong = self.others(name) if first.code == 0 else f"the first ended with {first.code}"
            row.add("the run ended with its bits", wrong and f"moment {at}: {wrong}")

    def stale(self, name: str) -> None:
        row = self.row(f"{name}: a lock that nobody holds, whatever it says")
        for text in ("", "1 elsewhere", f"{os.getpid()} {socket.gethostname()}", "\0" * 30, "99999999999999999999 x y"):
            (self.halfway(name) / ".lock").write_text(text, "utf-8")
            row.add("gone on with", self.resumed(name))

    # --- damage ----------------------------------------------------------------------------------------------------

    def damaged(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = damage.make(self.place / "damaged")
        for name in damage.FILES:
            row = self.row(f"{name}: other bytes, lost ones, doubled ones, an early end")
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    row.ends = dict(damage.tried(made, name, self.damages))
                row.times = sum(row.ends.values())
            except Exception as error:  # noqa: BLE001 - whatever else it was answered by
                row.add("", with_kind(error))

    # --- the page --------------------------------------------------------------------------------------------------

    def page(self) -> str:
        lines = [
            "# The table of faults",
            "",
            "    python experiments/faults.py --out experiments/results/faults.md",
            "",
            "Tiny random models. *Gone on with*: `train --resume` ended with the bytes (weights, log of losses,",
            "metrics) of the run that nothing befell, `replay` said yes, and nothing was left behind. *One line*: exit",
            "code 2 and a line that says what must be otherwise, without a traceback.",
            "",
            "| what was done | times | how it ended | lost or wrong |",
            "|---|---:|---|---:|",
        ]
        for row in self.rows:
            ends = "; ".join(f"{end} ({count:,})" for end, count in row.ends.items()) or "–"
            lines.append(f"| {row.what} | {row.times:,} | {ends} | {len(row.wrong)} |")
        for row in self.rows:
            if row.wrong:
                lines += ["", f"{row.what}:", "", *(f"- {self.nameless(each)}" for each in row.wrong[:20])]
        total, wrong = sum(row.times for row in self.rows), sum(len(row.wrong) for row in self.rows)
        return "\n".join([*lines, "", f"{total:,} faults, of which {wrong} were lost or wrong.", ""])

    def nameless(self, text: str) -> str:
        """Without what is of this machine."""
        return text.replace(str(self.place), "PLACE").replace(socket.gethostname(), "HOST")


def mount(arguments: Sequence[str]) -> int:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode
    except OSError:
        return 1


def no_line(ended: Ended) -> str | None:
    """What is wrong with how a command told of a fault."""
    if ended.code != 2:
        return f"ended with {ended.code}: {ended.lines[-1]}"
    if "Traceback" in ended.told or "Exception" in ended.told:
        return f"a traceback before: {ended.lines[-1]}"
    return None if LINE.match(ended.lines[-1]) else f"no line that tells: {ended.lines[-1]}"


def bits(run: Path) -> dict[str, str]:
    """sha256 of the files that two equal runs have alike."""
    files = [file for name in ("*.safetensors", "metrics.jsonl", "trajectory.bin") for file in run.rglob(name)]
    own = [file for file in files if "replayed" not in file.parts]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(own)}


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@contextlib.contextmanager
def without_drawing() -> Iterator[None]:
    """plot.png is written, and nothing drawn; what is written is not forced onto the disk."""

    def plot(folder: report.RunFolder) -> bool:
        write_atomically(folder.plot, b"drawn")
        return True

    kept = report.plot, os.fsync
    report.plot, os.fsync = plot, lambda handle: None
    try:
        yield
    finally:
        report.plot, os.fsync = kept


def done(table: Table, parts: Sequence[str], processes: int) -> list[list[Row]]:
    """The rows of each part, so many parts at a time."""
    global _table
    _table = table
    if processes == 1:
        return [_part(name) for name in parts]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_part, parts))


def _part(name: str) -> list[Row]:
    """In a place of its own, beside others."""
    _table.rows, _table.run = [], _table.place / name / "run"
    _table.run.parent.mkdir()
    PARTS[name](_table)
    return _table.rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page to write; standard output by default")
    parser.add_argument("--every", type=int, default=1, help="of how many moments one is taken")
    parser.add_argument("--damages", type=int, default=2000, help="of each file that is read back")
    parser.add_argument("--processes", type=int, default=1, help="parts that are done at a time")
    parser.add_argument("--rows", nargs="*", default=list(PARTS), choices=list(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place, without_drawing():
        os.environ["GRADIENTLESS_CACHE"] = str(Path(place, "cache"))
        table = Table(Path(place).resolve(), given.every, given.damages)
        table.rows = [row for rows in done(table, given.rows, given.processes) for row in rows]
        page = table.page()
    if given.out is None:
        print(page)
    else:
        write_atomically(given.out, page.encode())
    return int(any(row.wrong for row in table.rows))


HEAD, WHOLE, STAGES = "GLD on a head", "MeZO on all weights", "MeZO, then a ladder"
FULL = "no room (ENOSPC) from every operation on"


def _no_room(table: Table) -> None:
    table.fails(HEAD, errno.ENOSPC, FULL)
    table.fails(WHOLE, errno.ENOSPC, FULL, at_least=4)
    table.fails(STAGES, errno.ENOSPC, FULL, at_least=8)
    table.fails(HEAD, errno.ENOSPC, "no room (ENOSPC) at every operation, and room again after it", once=True)
    table.limited(HEAD)
    table.small_disk(HEAD)


def _other_disks(table: Table) -> None:
    table.fails(HEAD, errno.EROFS, "a file system that turns read-only (EROFS) at every operation")
    table.fails(HEAD, errno.EIO, "a disk that fails (EIO) from every operation on", at_least=2)
    table.fails(HEAD, errno.EACCES, "a folder that may not be written (EACCES) from an operation on", at_least=4)


def _two(table: Table) -> None:
    table.second(HEAD)
    table.reading(HEAD)
    table.stale(HEAD)


PARTS: dict[str, Callable[[Table], None]] = {
    "kills-gld": lambda table: table.kills(HEAD),
    "kills-again": lambda table: table.kills_again(HEAD),
    "kills-mezo": lambda table: table.kills(WHOLE),
    "kills-staged": lambda table: table.kills(STAGES),
    "two": _two,
    "no-room": _no_room,
    "other-disks": _other_disks,
    "gone": lambda table: table.vanishes(HEAD),
    "damages": Table.damaged,
}

_table: Table  # the processes' own, forked with all that it holds

if __name__ == "__main__":
    sys.exit(main())
