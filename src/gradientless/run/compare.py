"""Ways to use a model and to tune it, side by side: every method with every seed, scored on the same rows, one table.

Each result is kept in the folder as it is found, METHOD-seedSEED.json; a tuned method's run is a run folder beside it.
So a comparison that was stopped goes on where it stood, and one that is given more methods or seeds measures those
alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradientless.errors import UserError, unknown
from gradientless.language.metrics import accuracy_name, f1_name
from gradientless.language.splits import held_out
from gradientless.language.tasks import Splits
from gradientless.run.assemble import PASSES_OF_FIRST_ORDER
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import evaluate_folder, load_splits
from gradientless.run.layers import parse_value, shown
from gradientless.run.memory import give_back
from gradientless.run.named import is_own, texts_in
from gradientless.run.report import Column, markdown_table, percent, table_cells
from gradientless.run.runfolder import OF_RESULT, RunFolder, short_name
from gradientless.run.sealed import write_json, write_sealed
from gradientless.run.train import Stopped, train
from gradientless.run.untuned import SPEAKING, WAYS, mute
from gradientless.schema import COUNT, Maybe, fits, read_sealed
from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS
from gradientless.terminal import Console
from gradientless.writing import write_atomically

SURFACE = "full"  # what tuned methods tune where nobody says: all of the model, prompted where it has a prompt
SPEAKER = "starter:smollm2"  # the model of methods that ask one for words, where nobody names another
SHARED = ("task", "data", "seed", "out")  # the same for every method, but for data.max_length
OF_TUNING = ("optimizer", "tensors", "schedule", "loss")

RESULT = {  # of a METHOD-seedSEED.json
    "method": str,
    "options": dict,
    "config": dict,
    "metrics": {"accuracy": float, "f1": float},
    "forward_passes": COUNT,
    **dict.fromkeys(("seconds", "peak_memory_mib"), float),
    "texts_cut": Maybe(COUNT),
}
COLUMNS = (
    Column("accuracy, %", "metrics.accuracy", 100, 2, spread=True, form=" ({})"),
    Column("F1, %", "metrics.f1", 100, 2, spread=True, form=" ({})"),
    Column("forward passes", "forward_passes"),
    Column("time, s", "seconds", digits=1),
    Column("peak memory, MiB", "peak_memory_mib", digits=1),
)


@dataclass(frozen=True)
class Method:
    """A row of the table. name: of `WAYS`, or of an optimizer. overrides: key=value of its configuration.

    options: of a way, its own.
    """

    label: str
    name: str
    overrides: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tunes(self) -> bool:
        return self.name not in WAYS

    def place(self, out: Path, seed: int) -> Path:
        """Where its run of `seed` lies, if it tunes; the result stands beside it."""
        return out / f"{short_name(re.sub(r'[^a-zA-Z0-9_.-]+', '-', self.label))}-seed{seed}"


@dataclass(frozen=True)
class Comparison:
    """results: row name -> one for each seed, as `summary.json` has them. about: what was compared, JSON-able."""

    results: Mapping[str, Sequence[Mapping[str, Any]]]
    about: Mapping[str, Any]

    def show(self, console: Console) -> None:
        """The table, and what it holds."""
        from rich.table import Table

        (first, *titles), *body = table_cells(self.results, COLUMNS)
        table = Table()
        table.add_column(first, no_wrap=True)
        for title in titles:
            table.add_column(title, justify="right")
        for cells in body:
            table.add_row(*cells)
        console.print(table)
        console.print(self.caption(), highlight=False, markup=False)

    def markdown(self) -> str:
        return f"{markdown_table(self.results, COLUMNS)}\n{self.caption()}\n"

    def data(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        return {**self.about, "results": {name: list(each) for name, each in self.results.items()}}

    def caption(self) -> str:
        about = self.about
        seeds = ", ".join(map(str, about["seeds"]))
        meant = "; ".join(
            about[key] for key in ("accuracy_means", "f1_means") if about.get(key, "accuracy") != "accuracy"
        )
        chosen = ", on which tuned methods also chose their best evaluation" if about["split"] == "validation" else ""
        return (
            f"{about['task']} with {about['model']}: mean (standard deviation) over seeds {seeds}, scored on "
            f"{about['rows']:,} {about['split']} rows{chosen}; {meant}. Forward passes: over one batch, to "
            f"learn, not to score; a backward pass counts as two, so that a first-order step costs "
            f"{PASSES_OF_FIRST_ORDER}. Time: of training with its evaluations and, on a frozen body, its "
            "features; of the whole method where nothing is tuned. Peak memory: above the loaded model."
        )


# --- what is asked --------------------------------------------------------------------------------------------------


def read_methods(names: Sequence[str], arguments: Sequence[str]) -> tuple[list[Method], list[str]]:
    """The methods with their own settings, and the settings of all.

    names: a way, an optimizer, or LABEL=either for a row of another name. arguments: "key=value" for all,
    "LABEL:key=value" for one. Raises UserError with one line for each mistake.
    """
    lines: list[str] = []
    known = [*WAYS, *OPTIMIZERS, *FIRST_ORDER]
    chosen: dict[str, str] = {}
    for text in names:
        label, _, name = text.rpartition("=")
        label = label or name
        if name not in known and not is_own(name):
            lines.append(str(unknown("methods", "method", name, known)))
        elif label in chosen:
            lines.append(f"methods: must have names of their own, such as mine={name}, got '{label}' twice")
        chosen[label] = name
    if not chosen:
        lines.append("methods: must name at least one, got none")
    settings: dict[str, list[str]] = {label: [] for label in chosen}
    shared = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        label, colon, own = key.rpartition(":")
        if not colon:
            shared.append(argument)
        elif label not in chosen:
            lines.append(str(unknown("methods", "method", label, chosen)))
        else:
            settings[label].append(f"{own}={value}")
    methods = []
    for label, name in chosen.items():
        if name in WAYS:
            methods.append(_way(label, name, settings[label], lines))
        else:
            methods.append(Method(label, name, tuple(settings[label])))
        lines += [
            f"{label}:{setting.partition('=')[0]}: must be the same for every method, got one for '{label}' alone"
            for setting in methods[-1].overrides
            if _is_of(setting, SHARED) and not _is_of(setting, ("data.max_length",))
        ]
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))
    return methods, shared


def usual(
    names: Sequence[str] | None,
    recipe: str | None,
    settings: Sequence[str],
    flags: Mapping[str, Any],
    code: Iterable[str] | None = (),
) -> tuple[list[str], dict[str, Any], list[str]]:
    """The methods and the flags of a comparison, and lines about what it takes unasked: without a model, one that says
    words where a method asks it for some; without methods, those that the model can do on these rows.

    names: None where nobody said. settings: "key=value" for all. Raises UserError."""
    notes, own = [], dict(flags)
    asked = list(WAYS) if names is None else list(names)
    speak = [name for name in asked if name.rpartition("=")[2] in SPEAKING]
    named = recipe is not None or own.get("model") is not None or any(_is_of(each, ("model",)) for each in settings)
    if speak and not named:
        own["model"] = SPEAKER
        notes.append(f"model       {SPEAKER}, taken unasked: {', '.join(speak)} ask it for words")
    if names is None:
        config = RunConfig.load(recipe, [each for each in settings if not _is_of(each, OF_TUNING)], own, code)
        asked = [name for name in asked if config.kind in WAYS[name].kinds]
        if config.kind == "classification" and (told := mute(config)):
            asked = [name for name in asked if name not in SPEAKING]
            notes = [f"methods     {', '.join(asked)}, taken unasked; not {', '.join(speak)}: {told}"]
    return asked, own, notes


def _way(label: str, name: str, settings: Sequence[str], lines: list[str]) -> Method:
    """A method of `WAYS`; what is wrong with its settings is added to `lines`."""
    way = WAYS[name]
    options, overrides = dict(way.options), []
    for setting in settings:
        key, _, text = setting.partition("=")
        if key in options:
            options[key] = value = parse_value(text)
            if type(value) is not type(way.options[key]) or (isinstance(value, int) and value < 1):
                wanted = "a text" if isinstance(way.options[key], str) else "a whole number >= 1"
                lines.append(f"{label}:{key}: must be {wanted}, got {shown(value)}")
        elif _is_of(setting, (*way.keys, "model", "dtype", "micro_batch_size", *SHARED)):
            overrides.append(setting)
        else:
            lines.append(str(unknown(label, "setting", key, (*options, *way.keys, "model"))))
    return Method(label, name, tuple(overrides), options)


def _is_of(setting: str, keys: Sequence[str]) -> bool:
    """Whether "key=value" sets one of `keys` or something inside it."""
    key = setting.partition("=")[0].strip()
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def configurations(
    methods: Sequence[Method],
    seeds: Sequence[int],
    recipe: str | None,
    shared: Sequence[str],
    flags: Mapping[str, Any],
    code: Iterable[str] | None = (),
) -> dict[str, list[RunConfig]]:
    """label -> the configuration of each seed. code: see `RunConfig.load`. Raises UserError with one line for each
    mistake."""
    found: dict[str, list[RunConfig]] = {}
    faults: dict[str, list[str]] = {}  # line -> whose
    for method in methods:
        own_keys = tuple(setting.partition("=")[0].strip() for setting in method.overrides)
        rest = [each for each in shared if not _is_of(each, own_keys)]
        if not method.tunes:
            rest = [each for each in rest if not _is_of(each, OF_TUNING)]
        settings = [*rest, *method.overrides]
        own: dict[str, Any] = {key: value for key, value in flags.items() if key not in own_keys}
        if method.tunes:
            own["optimizer.name"] = method.name
            if recipe is None and not any(_is_of(each, ("surface.name",)) for each in settings):
                own["surface.name"] = SURFACE
        try:
            found[method.label] = [RunConfig.load(recipe, settings, {**own, "seed": seed}, code) for seed in seeds]
            if method.tunes and found[method.label][0].forward_passes is None:
                raise UserError("--forward-passes: must be given for methods that tune, got nothing")
            if found[method.label][0].stages:
                raise UserError("stages: must not stand in a recipe to compare methods on, got a run of several stages")
        except UserError as error:
            for line in str(error).split("\n"):
                faults.setdefault(line, []).append(method.label)
    if faults:
        everywhere = len(methods)
        raise UserError(
            "\n".join(
                line if len(whose) == everywhere else f"{', '.join(whose)}: {line}" for line, whose in faults.items()
            )
        )
    return found


# --- measuring ------------------------------------------------------------------------------------------------------


def compare(
    methods: Sequence[Method],
    configs: Mapping[str, Sequence[RunConfig]],
    out: Path,
    console: Console | None = None,
) -> Comparison:
    """Measure what `out` does not hold yet; writes compare.md and compare.json there.

    configs: of `configurations`. Raises UserError, and `train.Stopped` when a run was asked to stop.
    """
    console = console or Console(stderr=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        results[method.label] = []
        last: tuple[Splits, dict[str, Any]] | None = None
        for config in configs[method.label]:
            splits = load_splits(config)
            kept = _kept(method, config, out)
            if kept is None:
                same = last is not None and not method.tunes and not WAYS[method.name].seeded and last[0] == splits
                result = last[1] if last is not None and same else _measured(method, config, splits, out, console)
                kept = {"method": method.name, "options": dict(method.options), **result}
                write_sealed(_record(method, config, out), {**kept, "config": config.decisive()})
            last = splits, {key: kept[key] for key in kept if key not in ("method", "options", "config")}
            results[method.label].append({"seed": config.seed, **last[1]})
            said = f"accuracy {percent(kept['metrics']['accuracy'])}  F1 {percent(kept['metrics']['f1'])}"
            console.print(f"{method.label:<12} seed {config.seed}  {said}", highlight=False, markup=False)
    first = configs[methods[0].label]
    comparison = Comparison(results, _about(methods, first, splits))
    write_atomically(out / "compare.md", comparison.markdown().encode())
    write_json(out / "compare.json", comparison.data())
    return comparison


def _about(methods: Sequence[Method], configs: Sequence[RunConfig], splits: Splits) -> dict[str, Any]:
    config = configs[0]
    return {
        "task": config.task or config.data.path,
        "model": config.model,
        "seeds": [each.seed for each in configs],
        "split": "test" if splits.test else "validation",
        "rows": len(held_out(splits)),
        "accuracy_means": accuracy_name(splits.labels, splits.kind),
        "f1_means": f1_name(splits.labels, splits.kind),
        "methods": {each.label: {"method": each.name, "settings": list(each.overrides)} for each in methods},
    }


def _record(method: Method, config: RunConfig, out: Path) -> Path:
    place = method.place(out, config.seed)
    return place.with_name(f"{place.name}.json")


def _kept(method: Method, config: RunConfig, out: Path) -> dict[str, Any] | None:
    """The result that `out` holds already. Raises UserError when it is another configuration's."""
    file = _record(method, config, out)
    if not file.exists():
        return None
    kept = read_sealed(file, "--out", RESULT)
    named, options = kept["method"], kept["options"]
    lines = config.differences(RunConfig.stated(f"--out: {file.name}", kept["config"], config, str(file)))
    if not method.tunes:
        read = (*WAYS[method.name].keys, "model", "dtype", "batch_size", *SHARED)
        lines = [line for line in lines if _is_of(line.replace(":", "=", 1), read)]
    if named != method.name:
        lines.append(f"{method.name} here, {named} there")
    own = method.options.items()
    lines += [f"{key}: {shown(v)} here, {shown(options.get(key))} there" for key, v in own if options.get(key) != v]
    _agree(method, config, lines)
    return kept


def _agree(method: Method, config: RunConfig, lines: Sequence[str]) -> None:
    if lines:
        told = "; ".join(lines)
        raise UserError(
            f"--out: must hold results of the same settings, got {method.label}, seed {config.seed}: {told}"
        )


def _measured(method: Method, config: RunConfig, splits: Splits, out: Path, console: Console) -> dict[str, Any]:
    """accuracy, f1 and loss on the held-out rows, forward passes, seconds and peak memory."""
    give_back()  # of the method before: no part of this one's loaded model
    rows = held_out(splits)
    if not rows:
        raise UserError("data: there must be test or validation rows to score on, got none")
    try:
        if method.tunes:
            return _tuned(method, config, splits, out, console)
        found = WAYS[method.name].use(config, splits, method.options)
        for note in found.notes:
            console.print(f"{method.label:<12} seed {config.seed}  {note}", highlight=False, markup=False)
        return {
            "metrics": dict(found.metrics),
            "forward_passes": found.forward_passes,
            "seconds": round(found.seconds, 3),
            "peak_memory_mib": round(found.peak_memory_mib, 1),
            "texts_cut": found.texts_cut,
            "notes": list(found.notes),
        }
    except UserError as error:
        raise UserError("\n".join(f"{method.label}: {line}" for line in str(error).split("\n"))) from None


def _tuned(method: Method, config: RunConfig, splits: Splits, out: Path, console: Console) -> dict[str, Any]:
    """A run in a folder of its own, continued where it stood; its best model on the held-out rows."""
    folder = RunFolder(method.place(out, config.seed))
    with folder.held():
        fresh = not folder.holds_run()
        if not fresh:
            _agree(method, config, config.differences(folder.read_config(texts_in(config.resolved()))))
        RunFolder.create(folder.path, config.toml(), resume=True)
        try:
            summary = train(config, folder, resume=not fresh, console=console)
            fits(f"run: {folder.summary.name} in '{folder.path}'", summary, OF_RESULT)
        except Stopped:
            raise
        except Exception:
            if fresh:
                folder.withdraw()
            raise
    metrics, cut = summary["metrics"], sum(summary["texts_cut"].values())
    if splits.test:
        how: dict[str, Any] = {"batch_size": config.micro_batch_size, "device": config.device, "say": console.print}
        found = evaluate_folder(folder.path, splits, "test", **how, code=texts_in(config.resolved()))
        metrics = {key: found[key] for key in metrics if key in found}
        cut += found["texts_cut"]
    return {
        "metrics": metrics,
        **{key: summary[key] for key in ("forward_passes", "peak_memory_mib", "features_seconds")},
        "seconds": round(summary["seconds"] + summary["features_seconds"], 3),
        "texts_cut": cut,
    }
