"""What a step of a surface with an optimizer takes: memory above the loaded model, and time.

Every figure is measured in a process of its own, over random words of the length asked for, by the objective that a run
has (on a CPU that is a few rows at a time). The process loads the model, does one step with one row (which loads and
compiles what a first step does), forgets its optimizer and gradients, and counts from what is in use then.

Peak memory: on CUDA what the allocator gave out; on a CPU the resident memory of the process, which has in it what the
C library keeps of freed memory, and beside it the bytes of tensors alone, counted over two more steps.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradientless.errors import UserError, unknown
from gradientless.run.config import RunConfig, optimizer_options, surface_class, surface_options

if TYPE_CHECKING:
    from gradientless.terminal import Console

TASK = "sst2"  # whose prompts and number of labels stand for any; its rows are not read
INFERENCE = "inference"
USUAL = (
    ("full", "mezo"), ("full", "adamw"), ("lora", "mezo"), ("lora", "adamw"), ("side_lora", "adamw"), ("lst", "adamw"),
    ("head", "gld"),
)  # fmt: skip
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
WHAT, WHY = "what", "why not"  # titles of columns
WORDS = ("model", WHAT, WHY)
TRUSTED = 64  # times the larger batch measured, up to which a line through two is followed


@dataclass(frozen=True)
class Case:
    """What is measured. optimizer None: a forward pass of the surface, without anything kept for gradients.

    config: None where there is none, and `why` says why not.
    """

    model: str
    surface: str
    optimizer: str | None
    config: RunConfig | None
    why: str = ""

    @property
    def name(self) -> str:
        return INFERENCE if self.optimizer is None else f"{self.surface} + {self.optimizer}"


@dataclass(frozen=True)
class Figures:
    """Of one case at one batch size. Sizes in MiB.

    loaded: in use before the first step (on a CPU, of the whole process with its libraries). peak: of the steps, above
    that. start: the same of what the surface does with rows before the first step; None where it does nothing. tensors:
    bytes of tensors alone; None on CUDA, where `peak` is that. weights: of the model. seconds: a step, the median.
    touched, products, multiplies: of the backward pass over one row; 0 where there is none.
    """

    batch_size: int
    loaded: float
    peak: float
    start: float | None
    tensors: float | None
    weights: float
    seconds: float
    tuned: int
    registered: int
    touched: int
    share: float
    products: int
    multiplies: int

    @property
    def above(self) -> float:
        """The most that is taken above the loaded model."""
        return max(self.peak, self.start or 0.0)


@dataclass(frozen=True)
class Measured:
    """A row of the table: figures, or why there are none."""

    case: Case
    figures: Figures | None
    why: str = ""

    def data(self) -> dict[str, Any]:
        case = {"model": self.case.model, "surface": self.case.surface, "optimizer": self.case.optimizer}
        return case | ({"why": self.why} if self.figures is None else asdict(self.figures))


# --- what is asked --------------------------------------------------------------------------------------------------


def cases(
    models: Sequence[str],
    surfaces: Sequence[str],
    optimizers: Sequence[str],
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> list[Case]:
    """For every model: inference, and each surface with each optimizer; `USUAL` where neither is named.

    settings: "key=value" of a recipe; one of `surface.` or `optimizer.` holds where there is such an option. Raises
    `UserError` for names and settings that nothing knows.
    """
    from gradientless.language.surfaces import SURFACES
    from gradientless.run.named import is_own
    from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS

    lines = [
        str(unknown("--surface", "surface", name, SURFACES))
        for name in surfaces
        if name not in SURFACES and not is_own(name)
    ]
    known = [*OPTIMIZERS, *FIRST_ORDER]
    lines += [
        str(unknown("--optimizer", "optimizer", name, known))
        for name in optimizers
        if name not in known and not is_own(name)
    ]
    if lines:
        raise UserError("\n".join(lines))
    pairs: list[tuple[str, str]] = list(USUAL)
    if surfaces or optimizers:
        pairs = [(s, o) for s in surfaces or ("full",) for o in optimizers or ("mezo", "adamw")]
    chosen: list[tuple[str, str | None]] = [("full", None), *pairs]
    _check_settings(settings, chosen)
    found = []
    for model in models:
        for surface, optimizer in chosen:
            own = {**(flags or {}), "model": model, "surface.name": surface, "optimizer.name": optimizer or "mezo"}
            fit = [each for each in settings if _fits(each, surface, optimizer)]
            try:
                config = RunConfig.load(None, [f"task={TASK}", "steps=1000", *fit], own)
            except UserError as error:
                if optimizer is None:  # nothing of a surface or an optimizer: wrong for all
                    raise
                found.append(Case(model, surface, optimizer, None, _one_line(error)))
            else:
                found.append(Case(model, surface, optimizer, config))
    return found


def _check_settings(settings: Sequence[str], chosen: Sequence[tuple[str, str | None]]) -> None:
    lines = []
    for setting in settings:
        key = setting.partition("=")[0].strip()
        section, _, option = key.partition(".")
        if key in ("surface.name", "optimizer.name", "model", "batch_size", "data.max_length"):
            lines.append(f"{key}: must be given as an option, --{key.partition('.')[0]}, got '{setting}'")
        elif not any(_fits(setting, *each) for each in chosen):
            have = sorted({name for each in chosen for name in _options(section, *each)})
            lines.append(str(unknown("profile", f"{section} option of what is profiled", option, have)))
    if lines:
        raise UserError("\n".join(lines))


def _fits(setting: str, surface: str, optimizer: str | None) -> bool:
    """Whether "key=value" says something to this surface and optimizer."""
    section, _, option = setting.partition("=")[0].strip().partition(".")
    return section not in ("surface", "optimizer") or option in _options(section, surface, optimizer)


def _options(section: str, surface: str, optimizer: str | None) -> set[str]:
    if section == "surface":
        return {*surface_options(surface), "recompute", *(["cache"] if surface_class(surface).keeps_states else [])}
    return set() if optimizer is None else set(optimizer_options(optimizer)[0])


def read_size(text: str) -> float:
    """A size of memory in MiB: "4GiB", "800 MB". Raises `UserError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS or not float(match[1]) > 0:
        raise UserError(f"--fits: must be a size of memory such as 4GiB or 800MB, got '{text}'")
    return float(match[1]) * UNITS[match[2].upper()] / 2**20


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(config: RunConfig, inference: bool = False, steps: int = 5) -> Figures:
    """The figures of `config`, in this process. Raises `UserError` for what cannot be."""
    import torch

    from gradientless.language.surfaces.products import Products
    from gradientless.language.tasks import Example, find_task
    from gradientless.run.assemble import Rows, make_optimizer, make_surface
    from gradientless.run.evaluation import pick_device
    from gradientless.run.memory import PeakMemory, TensorBytes, give_back, loaded
    from gradientless.run.train import SHARED_FROM
    from gradientless.search.noise import Noise
    from gradientless.search.optim import FIRST_ORDER, ForwardOptimizer

    device, noise = pick_device(config.device), Noise(config.seed)
    surface = make_surface(config, find_task(TASK).labels, device)
    words = " ".join(["film", "good", "bad", "plot"] * (config.data.max_length // 4 + 1))
    examples = [Example(words, i % 2) for i in range(config.batch_size)]
    uncached = config.model_copy(update={"surface": config.surface.model_copy(update={"recompute": True})})
    keeps = surface.cacheable and not config.surface.recompute
    first = config.optimizer.name in FIRST_ORDER
    weights = {id(tensor): tensor for tensor in (*surface.parameters(), *surface.buffers())}.values()
    loaded(surface, searches=not (first or inference))

    def ready(count: int) -> Any:
        own = uncached.model_copy(update={"batch_size": count})
        return Rows(surface, examples[:count], own, "")

    def optimize() -> Callable[[Any], object]:
        """A step of a new optimizer."""
        if inference:

            def look(objective: Any) -> None:
                with torch.no_grad():
                    float(objective())

            return look
        optimizer = make_optimizer(config, surface)
        if isinstance(optimizer, ForwardOptimizer):
            optimizer.fused = True
            return optimizer.step

        def step(objective: Any) -> None:
            optimizer.zero_grad(set_to_none=True)
            objective.backward()
            optimizer.step()

        return step

    def forget() -> None:
        for tensor in surface.parameters():
            tensor.grad = None
        give_back()

    surface.train(surface.dropout > 0)
    optimize()(ready(1).objective(0, noise))
    forget()
    memory, rows = PeakMemory(device), ready(config.batch_size)
    start: float | None = None
    if surface.needs_rows and not inference:
        surface.begin(rows.encoded, show=False)
        start = memory.mib()
        forget()
        memory.again()
    if keeps:  # as `Rows` does for a whole split, and keeps on disk
        frozen: Any = surface
        rows.features = frozen.features(rows.encoded.batch(range(len(examples)))).cpu().numpy()
        largest = max(tensor.numel() for tensor in surface.trainable().values())
        if config.batch_size * largest < SHARED_FROM:
            torch.set_num_threads(1)
    step, times = optimize(), []
    levels = (config.optimizer.arguments.get("options") or (1, 0))[1]
    for t in range(1 + levels + steps):  # the first makes what an optimizer keeps; options grow until the last level
        begin = time.perf_counter()
        step(rows.objective(t, noise))
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    peak = memory.mib()
    del step
    forget()
    tensors: float | None = None
    if not device.startswith("cuda"):
        again = optimize()
        with TensorBytes() as counter:
            for t in range(2):
                again(rows.objective(t, noise))
        tensors = counter.peak / 2**20
        del again
        forget()
    counted: Products = surface.products()
    return Figures(
        batch_size=config.batch_size,
        loaded=memory.start / 2**20,
        peak=peak,
        start=start,
        tensors=tensors,
        weights=sum(tensor.numel() * tensor.element_size() for tensor in weights) / 2**20,
        seconds=statistics.median(times[-steps:]),
        tuned=0 if inference else counted.tuned,
        registered=0 if inference else counted.registered,
        touched=counted.touched if first and not inference else 0,
        share=0.0 if inference else counted.share,
        products=counted.calls if first and not inference else 0,
        multiplies=counted.multiplies if first and not inference else 0,
    )


def measured(case: Case, steps: int = 5, threads: int | None = None) -> Measured:
    """The row of `case`, in a process of its own."""
    if case.config is None:
        return Measured(case, None, case.why)
    asked = {"config": case.config.resolved(), "inference": case.optimizer is None, "steps": steps, "threads": threads}
    environment = dict(os.environ)
    if threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, "-m", "gradientless.run.profile"],
        input=json.dumps(asked),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        answer = json.loads(done.stdout.strip().rpartition("\n")[2])
        if "why" in answer:
            return Measured(case, None, answer["why"])
        return Measured(case, Figures(**answer))
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Measured(case, None, "out of memory: the system ended the process")
    last = (done.stderr.strip() or f"exit code {done.returncode}").rpartition("\n")[2]
    return Measured(case, None, f"failed: {last}")


def _answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the process of a case prints."""
    import torch

    from gradientless.run.memory import is_out_of_memory

    if asked["threads"] is not None:
        torch.set_num_threads(asked["threads"])
    try:
        return asdict(measure(RunConfig.model_validate(asked["config"]), asked["inference"], asked["steps"]))
    except UserError as error:
        return {"why": _one_line(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"why": "out of memory"}


def _one_line(error: UserError) -> str:
    return "; ".join(str(error).split("\n"))


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """rows: in the order asked for. about: length, dtype, device, steps and threads of all."""

    rows: Sequence[Measured]
    about: Mapping[str, Any]

    def cells(self) -> list[list[str]]:
        """The lines of the table, titles first. Columns that nothing fills are left out."""
        several = len({row.case.model for row in self.rows}) > 1
        first = ["model"] if several else []
        titles = ("tuned", "registered", "touched", "backward products", "peak, MiB", "tensors, MiB", "start, MiB")
        lines = [[*first, WHAT, *titles, "s a step", WHY]]
        for row in self.rows:
            found, names = row.figures, [*([row.case.model] if several else []), row.case.name]
            if found is None:
                lines.append([*names, *[""] * 8, row.why])
                continue
            inference = row.case.optimizer is None
            lines.append([
                *names,
                "" if inference else f"{_short(found.tuned)}, {100 * found.share:.2g}%",
                "" if inference else _short(found.registered),
                "" if inference else _short(found.touched) if found.products else "none",
                "" if inference else f"{found.products}, {_short(found.multiplies)}" if found.products else "none",
                f"{found.peak:,.1f}",
                "" if found.tensors is None else f"{found.tensors:,.1f}",
                "" if found.start is None else f"{found.start:,.1f}",
                f"{found.seconds:.3g}",
                "",
            ])  # fmt: skip
        return _filled(lines)

    def caption(self) -> str:
        about = self.about
        models = {row.case.model: row.figures for row in self.rows if row.figures is not None}
        sizes = ", ".join(f"{name} {found.weights:,.0f} MiB" for name, found in models.items() if found is not None)
        cuda = str(about["device"]).startswith("cuda")
        peak = (
            "what the device's allocator gave out at most"
            if cuda
            else "resident memory of a process of its own, with what the C library keeps of freed memory. Tensors: "
            "their bytes alone"
        )
        return (
            f"Weights: {sizes}. {about['device']}, {about['threads']} threads, {about['dtype']}, {about['batch_size']} "
            f"rows of {about['length']} tokens a step, {about['steps']} steps. Peak: above the loaded model, {peak}. "
            "Start: the same, of what a surface does with rows before the first step. Tuned: parameters, and their "
            "share of the model. Registered: parameters, tuned or frozen (buffers are none). Touched: "
            "tuned ones and those that the backward pass multiplies with. Backward products: matrix "
            "products of the backward pass over a row of one word, and their multiply-adds."
        )

    def show(self, console: Console) -> None:
        _show(console, self.cells())
        console.print(self.caption(), highlight=False, markup=False)

    def markdown(self) -> str:
        return f"{_markdown(self.cells())}\n{self.caption()}\n"

    def data(self) -> dict[str, Any]:
        return {**self.about, "rows": [row.data() for row in self.rows]}


@dataclass(frozen=True)
class Fit:
    """Whether a case fits a limit, by a line through its figures at two batch sizes. Sizes in MiB.

    largest: the batch that fits; 0 where none does, None where there are no figures. bounded: whether it is the line's
    own end, or where we stop following it.
    """

    case: Case
    small: Figures | None
    large: Figures | None
    limit: float
    why: str = ""

    @property
    def a_row(self) -> float:
        """What one row more takes."""
        if self.small is None or self.large is None:
            return math.nan
        rows = self.large.batch_size - self.small.batch_size
        return max(0.0, (self.large.peak - self.small.peak) / rows)

    def needed(self, batch_size: int) -> float:
        """Memory of a batch, the loaded model counted in."""
        assert self.small is not None
        steps = self.small.peak + (batch_size - self.small.batch_size) * self.a_row
        return self.small.loaded + max(steps, self.small.start or 0.0, 0.0)

    @property
    def largest(self) -> int | None:
        if self.small is None or self.large is None:
            return None
        end = TRUSTED * self.large.batch_size
        fitting = [size for size in (1, end) if self.needed(size) <= self.limit]
        if len(fitting) != 1:
            return fitting[-1] if fitting else 0
        low, high = 1, end
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needed(middle) <= self.limit else (low, middle)
        return low

    @property
    def bounded(self) -> bool:
        return self.large is not None and self.largest != TRUSTED * self.large.batch_size

    def data(self) -> dict[str, Any]:
        case = {"model": self.case.model, "surface": self.case.surface, "optimizer": self.case.optimizer}
        if self.small is None or self.large is None:
            return {**case, "why": self.why}
        measured = [asdict(self.small), asdict(self.large)]
        return {**case, "largest_batch": self.largest, "mib_a_row": self.a_row, "measured": measured}


@dataclass(frozen=True)
class Fits:
    """Which cases fit `limit` MiB, and with which batch."""

    fits: Sequence[Fit]
    limit: float
    about: Mapping[str, Any]

    def cells(self) -> list[list[str]]:
        one = next((fit for fit in self.fits if fit.small is not None and fit.large is not None), None)
        sizes = [0, 0] if one is None or one.small is None or one.large is None else [
            one.small.batch_size, one.large.batch_size
        ]  # fmt: skip
        above = [f"above at {size}, MiB" for size in sizes]
        lines = [["model", WHAT, "loaded, MiB", *above, "a row more", "batch of 1", "largest batch", WHY]]
        for fit in self.fits:
            names = [fit.case.model, fit.case.name]
            if fit.small is None or fit.large is None:
                lines.append([*names, *[""] * 6, fit.why])
                continue
            largest = "none" if fit.largest == 0 else f"{fit.largest:,}" + ("" if fit.bounded else " or more")
            lines.append([
                *names, f"{fit.small.loaded:,.0f}", f"{fit.small.above:,.0f}", f"{fit.large.above:,.0f}",
                f"{fit.a_row:,.2f}", f"{fit.needed(1):,.0f}", largest, "",
            ])  # fmt: skip
        return _filled(lines)

    def caption(self) -> str:
        about = self.about
        cuda = str(about["device"]).startswith("cuda")
        loaded = (
            "what the device's allocator holds before the first step; the device's own context comes on top"
            if cuda
            else "resident memory of the process before the first step, libraries and all"
        )
        few = (
            ""
            if cuda
            else " On a CPU a step sees a few rows at a time, so that its memory hardly grows with the batch."
        )
        return (
            f"What fits {self.limit:,.0f} MiB: measured at two batch sizes and extended along the line through them, "
            f"up to {TRUSTED} times the larger; {about['length']} tokens a row, {about['dtype']}, {about['device']}. "
            f"Loaded: {loaded}.{few} Above: with what the surface takes before the first step."
        )

    def show(self, console: Console) -> None:
        _show(console, self.cells())
        console.print(self.caption(), highlight=False, markup=False)

    def markdown(self) -> str:
        return f"{_markdown(self.cells())}\n{self.caption()}\n"

    def data(self) -> dict[str, Any]:
        return {**self.about, "limit_mib": self.limit, "fits": [fit.data() for fit in self.fits]}


def _short(count: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _filled(lines: list[list[str]]) -> list[list[str]]:
    """The lines without the columns that stand empty below their title."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    return [[line[i] for i in kept] for line in lines]


def _show(console: Console, cells: list[list[str]]) -> None:
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table

    from gradientless.terminal import Console

    head, *body = cells
    failed = head[-1] == WHY  # said below: a terminal is too narrow for it
    told = [line[:-1] if failed else line for line in cells]

    def table(between: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for title, *column in zip(*told, strict=True):
            if title in WORDS:  # may be broken, but not within a word
                made.add_column(title, min_width=max(len(word) for cell in column for word in ["", *cell.split()]))
            else:
                made.add_column("\n".join(title.rsplit(" ", 1)), justify="right", no_wrap=True)
        for line in told[1:]:
            made.add_row(*(cell.replace(", ", between) for cell in line))
        return made

    def widths(made: Table) -> Measurement:
        return console.measure(made, options=console.options.update(max_width=1 << 16))

    whole, broken = table(", "), table(",\n")
    if widths(whole).maximum <= console.width:
        console.print(whole)
    elif widths(broken).minimum <= console.width:
        console.print(broken)
    else:  # the terminal breaks the lines, and nothing is cut off
        wide = Console(file=console.file, width=widths(whole).maximum + len(head), force_terminal=console.is_terminal)
        wide.print(whole)
    for line in body:
        if failed and line[-1]:
            what = line[: head.index(WHAT) + 1]
            console.print(f"{' '.join(what)}: {line[-1]}", highlight=False, markup=False, soft_wrap=True)


def _markdown(cells: list[list[str]]) -> str:
    head, *body = cells
    rule = ["---" if title in WORDS else "---:" for title in head]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in (head, rule, *body)
    )


# --- the whole ------------------------------------------------------------------------------------------------------

Measure = Callable[[Case], Measured]


def profile(chosen: Sequence[Case], measure_one: Measure, about: Mapping[str, Any], console: Console) -> Profile:
    """Measure every case. Raises `UserError` when none of them can be measured."""
    with _progress(console, len(chosen)) as said:
        rows = [measure_one(said(case)) for case in chosen]
    _require_some(rows)
    return Profile(rows, about)


def fits(
    chosen: Sequence[Case], limit: float, measure_one: Measure, about: Mapping[str, Any], console: Console
) -> Fits:
    """Measure every case with its batch size and with twice that. limit: MiB. Raises `UserError` as `profile` does."""
    found: list[Fit] = []
    rows: list[Measured] = []
    with _progress(console, 2 * len(chosen)) as said:
        for case in chosen:
            twice = case
            if case.config is not None:
                doubled = case.config.model_copy(update={"batch_size": 2 * case.config.batch_size})
                twice = replace(case, config=doubled)
            pair = [measure_one(said(each)) for each in (case, twice)]
            rows += pair
            small, large = (row.figures for row in pair)
            found.append(Fit(case, small, large, limit, pair[0].why or pair[1].why))
    _require_some(rows)
    return Fits(found, limit, about)


def _require_some(rows: Sequence[Measured]) -> None:
    if all(row.figures is None for row in rows):
        raise UserError("\n".join(dict.fromkeys(row.why for row in rows)))


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[Case], Case]]:
    """What is measured, told on `console` while it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    from gradientless.terminal import Told

    columns = (Told(), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task, done = bar.add_task("measuring", total=total), iter(range(total))

        def say(case: Case) -> Case:
            bar.update(task, completed=next(done), description=f"{case.model}: {case.name}")
            return case

        yield say


def save(found: Profile | Fits, folder: Path) -> None:
    """Write profile.md and profile.json into `folder`."""
    from gradientless.run.sealed import write_json
    from gradientless.writing import write_atomically

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "profile.md", found.markdown().encode())
        write_json(folder / "profile.json", found.data())
    except OSError as error:
        raise UserError(f"--out: must be a folder that can be written, got '{folder}' ({error.strerror})") from None


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
