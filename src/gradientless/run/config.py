"""RunConfig: everything that decides a run, from a TOML recipe, `key=value` overrides and flags.

A run is its configuration, its seed and the losses that it measured, so whatever changes a result stands here. All
mistakes of a configuration are reported at once, one line each: *owner: requirement, got value*.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gradientless.errors import UserError, unknown
from gradientless.run.defaults import defaults
from gradientless.run.layers import LENGTHS, keyboard_layer, read_recipe, shown, stack
from gradientless.run.named import is_own, only, own, texts_in

if TYPE_CHECKING:
    from gradientless.language.surfaces import Surface
    from gradientless.search.schedules import Schedule

DEFAULT_TASK = "rotten-tomatoes"
DEFAULT_STEPS = 20_000
EPOCH = "epoch"
NOT_RESULTS = ("out", "device", "micro_batch_size", "test")  # say where and how a run is computed and scored, not what
OF_THE_RUN = ("seed", "device", "dtype", "max_length", "prompt")  # what a surface is made with, beside its options
ENTRIES = re.compile(r"(\d+)\s*\*\s*width")


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python would read true as 1
        raise ValueError(f"must be a number, got {shown(value)}")
    return value


MOST = 2**32  # steps, which the noise counts with 32 bits, and everything else that is counted
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, lt=MOST)]
Batch = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=2**24)]  # its rows are drawn at once
Natural = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=MOST)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**63)]
Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
Dropout = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1, allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Path_ = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]


# --- names, against the registries ---------------------------------------------------------------------------------


def _registered(kind: str) -> list[str]:
    """The registered names of a kind; imported here so that reading this module loads neither torch nor models."""
    if kind == "task":
        from gradientless.language.tasks import TASKS

        return sorted(TASKS)
    if kind == "schedule":
        from gradientless.search.schedules import SCHEDULES

        return sorted(SCHEDULES)
    if kind == "starter model":
        from gradientless.language.starter import ASSETS

        return [f"starter:{name}" for name, asset in ASSETS.items() if not asset.entry.endswith(".csv")]
    from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS

    return sorted([*OPTIMIZERS, *FIRST_ORDER])


def surface_class(name: str) -> type[Surface]:
    """The surface's class: of the registry, or the user's own for "file.py:Class". Raises UserError."""
    from gradientless.language.surfaces import SURFACES, Surface

    if not is_own(name):
        if name not in SURFACES:
            raise unknown("surface.name", "surface", name, SURFACES)
        return SURFACES[name]
    found = own("surface", name)
    if not issubclass(found, Surface):
        raise UserError(f"surface: '{name}' must be a gradientless.language.surfaces.Surface, got {found!r}")
    if lacks := sorted(found.__abstractmethods__):
        raise UserError(f"surface: '{name}' must have the methods of a Surface, got none called {', '.join(lacks)}")
    return found


def surface_options(name: str) -> dict[str, Any]:
    """Options of a surface with their defaults, without those that the run gives it. Raises UserError."""
    from gradientless.language.surfaces import options_of

    return {
        key: None if parameter.default is parameter.empty else parameter.default
        for key, parameter in options_of(surface_class(name)).items()
        if key not in OF_THE_RUN
    }


def schedule_of(name: str) -> str | Schedule:
    """The registered name, or the user's own function for "file.py:function". Raises UserError."""
    if is_own(name):
        return own("schedule", name, "function")  # type: ignore[no-any-return]
    if name not in _registered("schedule"):
        raise unknown("schedule.name", "schedule", name, _registered("schedule"))
    return name


def _checked_by(find: Callable[[str], object]) -> AfterValidator:
    def check(name: str) -> str:
        find(name)
        return name

    return AfterValidator(check)


def _check_task(name: str | None) -> str | None:
    if name is not None:
        from gradientless.language.tasks import find_task

        find_task(name)
    return name


def _check_subset(value: Any) -> Any:
    counts = isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value)
    if value is not None and not (counts and len(value) in (2, 3) and value[0] >= 1):
        wanted = "[train, validation] or [train, validation, test] in whole numbers, train >= 1"
        raise UserError(f"data.subset: must be {wanted}, got {shown(value)}")
    return value


def _check_layers(value: Any) -> Any:
    count = type(value) is int and value >= 1
    numbers = isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value)
    if value is not None and not (count or numbers):
        wanted = "a whole number >= 1, or a list of whole numbers >= 0"
        raise UserError(f"surface.layers: must be {wanted}, got {shown(value)}")
    return value


def _check_class_weights(value: Any) -> Any:
    table = isinstance(value, Mapping) and all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < math.inf
        for weight in value.values()
    )
    if value is not None and value != "balanced" and not table:
        raise UserError(f'class_weights: must be "balanced" or a table of label = weight > 0, got {shown(value)}')
    return value


def _check_stages(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or not all(isinstance(table, Mapping) for table in value):
        raise UserError(f"stages: must be a list of tables, got {shown(value)}")
    return value


def _check_model(model: str) -> str:
    if Path(model).expanduser().is_dir():
        return model
    if model.startswith("starter:"):
        if model not in _registered("starter model"):
            raise unknown("model", "starter model", model, _registered("starter model"))
    elif not _is_hub_id(model) and not model.startswith(("~", ".")) and not re.search(r"[/\\]", model):
        raise _no_model(model)
    return model


def _is_hub_id(model: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)) and not model.startswith(".")


def _no_model(model: str) -> UserError:
    return UserError(f"model: must be starter:NAME, an existing folder or a hub id such as owner/name, got '{model}'")


def _absent_model(model: Any) -> list[str]:
    """The line for a model that is a folder by its name, and not there."""
    if not isinstance(model, str) or model.startswith("starter:") or _is_hub_id(model):
        return []
    return [] if Path(model).expanduser().is_dir() else [str(_no_model(model))]


def _check_activation(activation: str) -> str:
    from gradientless.language.surfaces.head import ACTIVATIONS

    if activation not in ("auto", *ACTIVATIONS):
        raise unknown("surface.activation", "activation", activation, ("auto", *ACTIVATIONS))
    return activation


def _check_loss(loss: str) -> str:
    from gradientless.run.losses import check_loss

    check_loss(loss)
    return loss


def _check_reward(reward: str | None) -> str | None:
    if reward is not None:
        if not is_own(reward):
            raise UserError(f"reward: must be 'module:function' or 'file.py:function', got '{reward}'")
        own("reward", reward, "function")
    return reward


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"device: must be auto, cpu, cuda, cuda:N or mps, got '{device}'")
    return device


def optimizer_class(name: str) -> type:
    """The optimizer's class: of the registry, or the user's own for "file.py:Class". Raises UserError."""
    if is_own(name):
        return own("optimizer", name)
    from gradientless.search.optim import OPTIMIZERS

    if name not in OPTIMIZERS:
        raise unknown("optimizer", "optimizer", name, _registered("optimizer"))
    return OPTIMIZERS[name]


def optimizer_options(name: str) -> tuple[dict[str, Any], bool]:
    """Options of an optimizer with their defaults, and whether it takes others too (**kwargs). Raises UserError."""
    from gradientless.search.optim import FIRST_ORDER

    if name in FIRST_ORDER:
        return dict(FIRST_ORDER[name].defaults), False
    parameters = list(inspect.signature(optimizer_class(name)).parameters.values())[1:]  # the first is `params`
    options = {
        p.name: None if p.default is inspect.Parameter.empty else p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    for key in ("seed", "model"):  # the run has one of each
        options.pop(key, None)
    return options, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _option_errors(owner: str, name: str, options: Mapping[str, Any]) -> list[str]:
    """One line for each option that the optimizer does not know, or whose value is of another kind."""
    from gradientless.search.optim import FIRST_ORDER

    known, takes_others = optimizer_options(name)
    lines = []
    for key, value in options.items():
        if key not in known:
            if key == "seed":
                lines.append(f"{owner}.seed: must be given as the run's seed, got {shown(value)}")
            elif not takes_others:
                lines.append(str(unknown(owner, f"option of {name}", key, known)))
        elif name in FIRST_ORDER:
            if wanted := FIRST_ORDER[name].require(key, value):
                lines.append(f"{owner}.{key}: must be {wanted}, got {shown(value)}")
        elif key == "entries":
            text = isinstance(value, str)
            if not (ENTRIES.fullmatch(value) if text else isinstance(value, int) and not isinstance(value, bool)):
                lines.append(f"{owner}.entries: must be a whole number or 'N*width', got {shown(value)}")
        elif not is_epoch(key, value):
            wanted = _kind_of(known[key])
            if wanted and _kind_of(value) != wanted:
                lines.append(f"{owner}.{key}: must be {wanted}, got {shown(value)}")
    return lines


def _kind_of(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return None if value is None else "a list" if isinstance(value, (list, tuple)) else "a table"


def is_epoch(key: str, value: Any) -> bool:
    """Whether an optimizer's option is a number of steps, given as "epoch"."""
    return key.endswith("_every") and value == EPOCH


def resolve_entries(entries: int | str | None, width: int) -> int | None:
    """The number s of entries that move: an int stays; "N*width" is N times `width`, the width of the features."""
    if isinstance(entries, str):
        match = ENTRIES.fullmatch(entries)
        if match is None:
            raise UserError(f"optimizer.entries: must be a whole number or 'N*width', got '{entries}'")
        return int(match[1]) * width
    return entries


# --- the schema ----------------------------------------------------------------------------------------------------


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, frozen=True, use_attribute_docstrings=True)


class _OpenSection(_Section):
    """A section whose further keys are options of the optimizer, or of a surface of the user's own."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """The further keys, by name."""
        return copy.deepcopy(self.model_extra or {})


class DataConfig(_Section):
    path: Path_ | None = None
    """A table (CSV, TSV, JSONL) or a folder; for a task, the folder with its files."""
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    validation: Path_ | None = None
    """A table to validate on; without one a seeded, stratified tenth is held out."""
    test: Path_ | None = None
    """A table to test on: none of its rows is trained on or chooses the weights."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used (an empty text, no label, another number of fields), rather than refuse their
    file."""
    max_length: Count = 128
    """Tokens an example may have; longer ones are cut."""
    few_shot: Count | None = None
    """k: train on k rows of each class and validate on k others, all of the training rows."""
    subset: Annotated[tuple[int, ...] | None, BeforeValidator(_check_subset)] = None
    """(train, validation) or (train, validation, test): train and validate on so many of the training rows, and test
    on so many of the held-out ones."""
    split_seed: Seed | None = None
    """Draws those rows, and the tenth of a table without a validation file; the run's seed by default."""

    @model_validator(mode="after")
    def _drawn_once(self) -> DataConfig:
        if self.few_shot is not None and self.subset is not None:
            raise UserError(f"data.subset: must not stand beside data.few_shot, got {list(self.subset)}")
        return self


class SurfaceConfig(_OpenSection):
    name: Annotated[str, _checked_by(surface_class)] = "head"
    """A registered surface, or "file.py:Class", whose options are further keys."""
    head: Literal["auto", "library", "two-layer", "linear"] = "auto"
    pooling: Literal["auto", "cls", "mean", "last"] = "auto"
    hidden: Count | None = None
    """Width of the two-layer head; the width of the features by default."""
    readout: Literal["auto", "head", "prompt", "tokens"] = "auto"
    """How class scores are read off: a classification head, or the label words of a prompt. "auto" is the head for
    encoders and for surface head, the prompt for other language models. "tokens": no classes, language modelling on the
    rows' texts, for side networks."""
    start: Literal["random", "probe", "real", "previous"] | None = None
    """Of a new classification head: random, or from the linear probe on the training rows ("probe"). Of virtual tokens:
    as real tokens are ("real"), or random. Of a later stage: as the stage before left it ("previous")."""
    truncation: Literal["right", "left"] = "right"
    """The side on which a prompt's text is cut when it is too long."""
    max_new_tokens: Count = 32
    """Of an answer that the model writes."""
    activation: Annotated[str, AfterValidator(_check_activation)] = "auto"
    """"relu", "tanh", "gelu"; "auto" is the library head's own, and relu for the two-layer head."""
    recompute: bool = False
    """Run the frozen body in every step, as the thesis did, not once per data set."""
    cache: bool = False
    """Keep the frozen backbone's states of every token on disk, so that steps do without it (lst, k_lst)."""
    dropout: Dropout = 0.0
    # Options of the surfaces beside and inside the model; None is the surface's own default.
    rank: Count | None = None
    alpha: Number | None = None
    targets: Names | None = None
    pattern: Names | None = None
    tokens: Count | None = None
    reparameterise: bool | None = None
    reduction: Count | None = None
    layers: Annotated[int | tuple[int, ...] | None, BeforeValidator(_check_layers)] = None
    temperature: Number | None = None
    init: str | None = None
    fisher_rows: Count | None = None
    connection_dropout: Dropout | None = None
    k: Count | None = None
    window: str | None = None
    combine: str | None = None
    down: str | None = None
    sharing: str | None = None
    unfrozen: Natural | None = None


class PromptConfig(_Section):
    """A prompt of your own; the task's by default."""

    name: str | None = None
    """Another of the task's prompts for the model's family than the first, such as "mezo"."""
    text: str | None = None
    """The template, with {text}, perhaps {text_pair}, and perhaps {label} or {mask} where the label word stands."""
    words: dict[str, str] = {}
    """Label -> label word."""
    score: Literal["sum", "mean"] | None = None
    """Of a label word or choice of several tokens: the sum of their log-probabilities, or the mean; as the task has it,
    or the sum, by default."""
    answer: str | None = None
    """How a choice or an answer is said, with {answer}; as the task has it by default."""

    @model_validator(mode="after")
    def _one_text(self) -> PromptConfig:
        if self.name is not None and self.text is not None:
            raise UserError(f"prompt.name: must not stand beside prompt.text, got {shown(self.name)}")
        return self


class ScheduleConfig(_Section):
    name: Annotated[str, _checked_by(schedule_of)] = "constant"
    """A registered schedule, or "file.py:function"."""
    floor: Fraction = 0.0
    """The multiplier h at the end."""
    warmup: Natural = 0
    """Steps of linear warmup."""
    cycles: Count = 1
    """Cycles of cosine-restarts."""


class OptimizerConfig(_OpenSection):
    name: str = "gld"
    """A registered optimizer, or "file.py:Class"."""


class TensorConfig(_OpenSection):
    """Options of the tensors whose name matches `pattern` (shell wildcards); the first match counts.

    The names are those of the optimizer's constructor (radius, entries, …), each for these tensors alone.
    """

    pattern: str
    schedule: ScheduleConfig | None = None


ABOVE_STAGES = ("task", "data", "model", "device", "out")  # of the whole run: a stage has none of its own


@dataclass(frozen=True)
class Stage:
    """One stage of a run: `config` is that of a run of its own; `number` counts from 1."""

    number: int
    name: str
    config: RunConfig

    @property
    def folder(self) -> str:
        """The name of its folder under stages/."""
        return f"{self.number}-{self.name}"

    @property
    def owner(self) -> str:
        """How lines for people name it."""
        return f"stages[{self.number}]"

    def line(self, line: str) -> str:
        """A line about a configuration as one about this stage's."""
        return _of_stage(self.owner, line)


class RunConfig(_Section):
    """One run. `load` builds it from a recipe, flags and overrides; building it directly checks the same."""

    task: Annotated[str, AfterValidator(_check_task)] | None = None
    """A registered task, or a TOML file that describes one; None with data.path: the user's own table."""
    model: Annotated[str, AfterValidator(_check_model)] = "starter:minilm"
    data: DataConfig = DataConfig()
    surface: SurfaceConfig = Field(default_factory=lambda: SurfaceConfig.model_construct())
    prompt: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig.model_construct())
    tensors: tuple[TensorConfig, ...] = ()
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig.model_construct())
    steps: Count | None = None
    """None: as many as forward_passes pays for, or epochs hold."""
    forward_passes: Count | None = None
    """A budget of forward passes over one batch of batch_size; the run ends before the step that would exceed it."""
    epochs: Positive | None = None
    """Times that every training row is seen; may be a part of one."""
    batch_size: Batch = 64
    micro_batch_size: Batch | None = None
    evaluate_every: Count = 1000
    patience: Count | None = None
    """Evaluations without improvement after which the run stops."""
    checkpoint_every: Count = 1000
    log_every: Count = 100
    best: Literal["auto", "accuracy", "f1", "mcc", "balanced_accuracy", "reward", "loss"] = "auto"
    """What tells the best of the evaluations, whose weights are saved and which patience waits for: the highest
    "accuracy", "f1", "mcc", "balanced_accuracy" or "reward", then the lowest loss; or the lowest "loss" alone. "auto"
    is the reward where there is one, else f1 where texts are written, the loss where tokens are said, and the
    accuracy."""
    loss: Annotated[str, AfterValidator(_check_loss)] = "cross-entropy"
    """What is minimised: "cross-entropy" over classes or choices; "lm", the mean negative log-likelihood of the right
    answer's tokens (the default for choices and generation); "accuracy", "f1", "exact-match" or "token-f1" (their
    lack); "reward"; or your own "file.py:function" of scores and labels."""
    class_weights: Annotated[str | dict[str, float] | None, BeforeValidator(_check_class_weights)] = None
    """How much a training row of each class counts in the cross-entropy: "balanced" for the inverse of the classes'
    shares (rows / (classes · rows of the class)), or a table label -> weight; 1 for a class that is not named."""
    reward: Annotated[str | None, AfterValidator(_check_reward)] = None
    """Your own "module:function" of predicted texts and rows, maximised in place of a loss."""
    seed: Seed = 42
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    out: Path_ | None = None
    """The run folder; None: a new folder under runs/."""
    stages: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_check_stages)] = ()
    """The run's stages, one after the other over one model: tables of these keys and `name`. What a stage does not say
    is as above the stages; without any, the run is what stands above."""

    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: what the layers dropped."""
        return self._notes

    @field_validator("micro_batch_size")
    @classmethod
    def _micro_batch_fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > info.data.get("batch_size", value):
            raise UserError(f"micro_batch_size: must be <= batch_size ({info.data['batch_size']}), got {value}")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, values: Any, handler: Any) -> RunConfig:
        """Defaults that depend on one another; then every check, so that one report holds all mistakes."""
        if not isinstance(values, Mapping):
            return handler(values)
        values = dict(values)
        if values.get("task") is None and _plain(values.get("data")).get("path") is None:
            values["task"] = DEFAULT_TASK
        if all(values.get(key) is None for key in LENGTHS):
            values["steps"] = DEFAULT_STEPS
        if values.get("loss") is None:
            values["loss"] = _default_loss(values)
        options = _options_of_sections(values)
        try:
            config = handler(values)
        except ValidationError as error:
            lines = error_lines(error) + options
            if isinstance(values.get("stages"), (list, tuple)):
                _read_stages(values, lines)
            raise UserError("\n".join(lines)) from None
        lines = options + config._warmup_lines() + config._loss_lines()
        if lines:
            raise UserError("\n".join(lines))
        _read_stages(config.resolved(), lines)
        if lines:
            raise UserError("\n".join(lines))
        return config

    @classmethod
    def stated(cls, owner: str, values: Any, beside: RunConfig, place: str) -> RunConfig:
        """The configuration that the file `place` of a run states, to be compared with the run's own, `beside`, whose
        code it may name. Raises UserError, in one line, for what is none."""
        try:
            with only(texts_in(beside.resolved()), place):
                return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{owner}: must state a configuration, got one with {error_lines(error)[0]}") from None

    @property
    def staged(self) -> tuple[Stage, ...]:
        """The stages with their whole configurations; none of a run without stages."""
        return tuple(_read_stages(self.resolved(), []))

    def _warmup_lines(self) -> list[str]:
        sections = [
            ("schedule", self.schedule),
            *((f"tensors[{i}].schedule", t.schedule) for i, t in enumerate(self.tensors)),
        ]
        return [
            f"{owner}.warmup: must be < steps ({self.steps}), got {schedule.warmup}"
            for owner, schedule in sections
            if schedule is not None and self.steps is not None and schedule.warmup >= self.steps
        ]

    @property
    def kind(self) -> str:
        """Of the task: "classification", "choice" or "generation"."""
        return _kind_of_task(self.task)

    def _loss_lines(self) -> list[str]:
        from gradientless.run.losses import REWARD, loss_of
        from gradientless.search.optim import FIRST_ORDER

        if self.reward is not None and self.loss != REWARD:
            return [f"reward: must stand alone, got loss '{self.loss}' too"]
        if self.best == "reward" and self.reward is None:
            return ["best: must be accuracy, f1 or loss where no reward is given, got 'reward'"]
        if self.best in ("mcc", "balanced_accuracy") and self.kind != "classification":
            return [f"best: must be accuracy, f1 or loss for a task of kind {self.kind}, got '{self.best}'"]
        if self.class_weights is not None and (self.loss != "cross-entropy" or self.kind != "classification"):
            return [f"class_weights: must stand with loss 'cross-entropy' over classes, got loss '{self.loss}'"]
        if self.class_weights is not None and self.surface.readout == "tokens":
            return ["class_weights: must stand with classes, got surface.readout 'tokens', which has none"]
        try:
            loss = loss_of(self.loss, self.reward, self.kind)
        except UserError as error:
            return [str(error)]
        if self.optimizer.name not in FIRST_ORDER or loss.differentiable:
            return []
        return [f"loss: must be differentiable for {self.optimizer.name}, got '{self.loss}'; use a forward optimizer"]

    @classmethod
    def load(
        cls,
        recipe: str | Path | None = None,
        overrides: Iterable[str] = (),
        flags: Mapping[str, Any] | None = None,
        code: Iterable[str] | None = (),
        sums: Mapping[str, str] | None = None,
        *,
        usual: bool = False,
        written: bool = False,
    ) -> RunConfig:
        """The configuration of `recipe` (a file, the name of a built-in recipe, or None for the schema's values alone).

        written: whether a run wrote the recipe; its base model may be elsewhere by now, or gone.
        usual: without a recipe, take what runs of its kind usually do (`run.defaults`).
        overrides: "dotted.key=value" with TOML values, or plain text; "key=default" takes a key of the recipe back.
        flags: dotted key -> value; None means that the flag was not given.
        code: whose names may stand in the recipe and be run, beside those that overrides and flags name; None: any.
        sums: of `sums_of`, of the code when the recipe was written.
        Raises UserError with one line for each mistake.
        """
        layer, lines = keyboard_layer(overrides, flags or {})
        below = read_recipe(recipe) if recipe is not None else defaults(layer) if usual else {}
        values, notes = stack(below, layer)
        lines += [] if written else _absent_model(values.get("model"))
        named = None if code is None else {*code, *texts_in(layer)}
        try:
            with only(named, str(recipe), sums):
                config = cls.model_validate(values)
        except ValidationError as error:
            raise UserError("\n".join(dict.fromkeys(lines + error_lines(error)))) from None
        if lines:
            raise UserError("\n".join(lines))
        config._notes = tuple(notes)
        return config

    def resolved(self) -> dict[str, Any]:
        """As plain data, defaults filled in, without what is None (TOML has no null)."""
        return _without_none(self.model_dump(mode="json"))

    def decisive(self) -> dict[str, Any]:
        """What of it decides results: as `resolved`, without where and how they are computed."""
        return {key: value for key, value in self.resolved().items() if key not in NOT_RESULTS}

    def toml(self) -> str:
        """As TOML, without `out`, so that a run folder may move; `load` of it gives an equal configuration."""
        return tomli_w.dumps({key: value for key, value in self.resolved().items() if key != "out"})

    def differences(self, other: RunConfig) -> list[str]:
        """Keys whose values differ, as "key: this value here, other value there"; without those of NOT_RESULTS."""
        mine, theirs = _flat(self.resolved()), _flat(other.resolved())
        keys = [
            key
            for key in {**mine, **theirs}
            if key.rpartition(".")[2] not in NOT_RESULTS and mine.get(key) != theirs.get(key)
        ]
        return [f"{key}: {shown(mine.get(key))} here, {shown(theirs.get(key))} there" for key in keys]


def _read_stages(whole: Mapping[str, Any], lines: list[str]) -> list[Stage]:
    """The stages of a configuration; `lines` takes one for each mistake that does not stand above them already."""
    above = list(lines)
    below = {key: value for key, value in whole.items() if key not in ("stages", "out")}
    found: list[Stage] = []
    for number, table in enumerate(whole.get("stages", ()), 1):
        if not isinstance(table, Mapping):
            continue  # which is told of the whole list
        owner, own = f"stages[{number}]", {key: value for key, value in table.items() if key != "name"}
        texts = _plain(below.get("surface")) | _plain(own.get("surface"))
        free = ("data",) if texts.get("readout") == "tokens" else ()  # whose texts may be others
        for key in [key for key in own if key in (*ABOVE_STAGES, "stages") and key not in free]:
            lines.append(f"{owner}.{key}: must stand above the stages, got {shown(own.pop(key))}")
        name = table.get("name")
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
            lines.append(f"{owner}.name: must be letters, digits, - and _, got {shown(name)}")
        try:
            config = RunConfig.model_validate(_over(below, own))
        except ValidationError as error:
            mine = [line for line in error_lines(error) if line not in above]
            lines += [_of_stage(owner, line) for line in mine]
            continue
        default = "-".join(each.name.rpartition(":")[2] for each in (config.optimizer, config.surface))
        found.append(Stage(number, re.sub(r"\W+", "-", default) if name is None else str(name), config))
    return found


# --- errors, in words ----------------------------------------------------------------------------------------------


def _of_stage(owner: str, line: str) -> str:
    line = line.removeprefix("config: ")
    of_key = re.split(r"\W", line, maxsplit=1)[0] in RunConfig.model_fields
    return f"{owner}{'.' if of_key else ': '}{line}"


def _over(whole: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A stage's values over those above the stages: another surface takes over the options that it has too."""
    below, surface = dict(whole), _plain(whole.get("surface"))
    name = _plain(own.get("surface")).get("name")
    if isinstance(name, str) and name != surface.get("name", "head"):
        with contextlib.suppress(UserError):  # which the stage's own check tells
            known = {"recompute", *(["cache"] if surface_class(name).keeps_states else []), *surface_options(name)}
            below["surface"] = {key: value for key, value in surface.items() if key in known}
    if "path" in _plain(own.get("data")):
        kept = ("max_length", "text_column", "split_seed")
        below["data"] = {key: value for key, value in _plain(whole.get("data")).items() if key in kept}
    elif "seed" in own:  # batches and noise anew, but no other rows: one stage's are not another's validation
        default = RunConfig.model_fields["seed"].default
        below["data"] = {"split_seed": whole.get("seed", default)} | _without_none(_plain(whole.get("data")))
    return stack(below, own)[0]


def _plain(section: Any) -> dict[str, Any]:
    if isinstance(section, BaseModel):
        return section.model_dump()
    return dict(section) if isinstance(section, Mapping) else {}


def _kind_of_task(name: str | None) -> str:
    from gradientless.language.tasks import find_task

    return "classification" if name is None else find_task(name).kind


def _default_loss(values: Mapping[str, Any]) -> str:
    from gradientless.run.losses import DEFAULTS, REWARD

    if values.get("reward") is not None:
        return REWARD
    try:
        return DEFAULTS[_kind_of_task(values.get("task"))]
    except (UserError, AttributeError):  # not a task: the field's own check says so
        return DEFAULTS["classification"]


def _options_of_sections(values: Mapping[str, Any]) -> list[str]:
    """One line for each mistake in the optimizer's name and options, in those of tensors, and in those of a surface.

    Read from the raw values, because pydantic stops at the first section that is wrong."""
    of_surface = _surface_errors(_plain(values.get("surface")))
    section = _plain(values.get("optimizer"))
    name = section.pop("name", OptimizerConfig.model_fields["name"].default)
    try:
        lines = of_surface + _option_errors("optimizer", str(name), section)
        tensors = values.get("tensors", ())
        for i, tensor in enumerate(tensors if isinstance(tensors, (list, tuple)) else ()):
            options = {key: value for key, value in _plain(tensor).items() if key not in TensorConfig.model_fields}
            lines += _option_errors(f"tensors[{i}]", str(name), options)
    except UserError as error:
        return of_surface + str(error).split("\n")
    return lines


def _surface_errors(section: Mapping[str, Any]) -> list[str]:
    """One line for each further key that is no option of the surface, or whose value is of another kind."""
    name = str(section.get("name", SurfaceConfig.model_fields["name"].default))
    further = {key: value for key, value in section.items() if key not in SurfaceConfig.model_fields}
    if not further or not is_own(name):
        return [_unknown_key(("surface", key)) for key in further]
    try:
        known = surface_options(name)
    except UserError:  # which the name's own check tells
        return []
    lines = []
    for key, value in further.items():
        if key not in known:
            lines.append(str(unknown("surface", f"option of {name}", key, known)))
        elif (wanted := _kind_of(known[key])) and _kind_of(value) != wanted:
            lines.append(f"surface.{key}: must be {wanted}, got {shown(value)}")
    return lines


def error_lines(error: ValidationError) -> list[str]:
    """pydantic's findings as lines *owner: requirement, got value*."""
    lines: list[str] = []
    for found in error.errors():
        where = found["loc"]
        owner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            lines.extend(str(cause).split("\n"))
        elif cause is not None:
            lines.append(f"{owner}: {cause}")
        elif found["type"] == "extra_forbidden":
            lines.append(_unknown_key(where))
        elif found["type"] == "missing":
            lines.append(f"{owner}: must be given, got nothing")
        else:
            lines.append(f"{owner}: {_requirement(found['msg'])}, got {shown(found['input'])}")
    return list(dict.fromkeys(lines))


def _requirement(message: str) -> str:
    message = message.replace("Input should be ", "must be ")
    for long, short in (
        ("greater than or equal to", ">="),
        ("less than or equal to", "<="),
        ("greater than", ">"),
        ("less than", "<"),
        ("a valid integer", "a whole number"),
        ("a valid number", "a number"),
        ("a valid string", "text"),
        ("a valid boolean", "true or false"),
        ("a valid dictionary or instance of", "a table of"),
        ("a finite number", "a finite number"),
        ("a valid tuple", "a list"),
        ("Unable to parse input string as an integer, exceeded maximum size", "must be a whole number of 64 bits"),
    ):
        message = message.replace(long, short)
    return re.sub(r", (unable to|got a number with).*| of \w+Config$", "", message)


_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "surface": SurfaceConfig,
    "prompt": PromptConfig,
    "schedule": ScheduleConfig,
    "optimizer": OptimizerConfig,
    "tensors": TensorConfig,
}


def _unknown_key(where: tuple[int | str, ...]) -> str:
    *parents, key = where
    if parents:
        section = ScheduleConfig if "schedule" in parents else _SECTIONS[str(parents[0])]
        owner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parents).lstrip(".")
        return str(unknown(owner, "key", key, section.model_fields))
    inner = [f"{name}.{field}" for name, section in _SECTIONS.items() for field in section.model_fields]
    inner += [f"optimizer.{option}" for option in optimizer_options("gld")[0]]
    for dotted in inner:  # a key of a section, written without the section
        if dotted.rpartition(".")[2] == key and not difflib.get_close_matches(str(key), RunConfig.model_fields, n=1):
            return f"config: unknown key '{key}'; did you mean '{dotted}'?"
    return str(unknown("config", "key", key, RunConfig.model_fields))


def _without_none(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return [_without_none(value) for value in values] if isinstance(values, list) else values


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    if prefix == "stages":
        for number, table in enumerate(values, 1):
            flat.update(_flat(table, f"stages[{number}]"))
        return flat
    if not isinstance(values, dict):
        return {prefix: values}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else key))
    return flat
