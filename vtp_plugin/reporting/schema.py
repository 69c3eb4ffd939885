"""What the files of a comparison hold, as types: a sweep file, and the parts of a run folder that are read.

Types are taken at their word: true is no number, 3 no text. Fields that are not listed are let through where a host
or a later version writes the file, and refused where a person does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vtp_plugin.errors import PruningError, one_line

PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=:@-]{0,199}")  # what a cell's folder may be called
KIND = re.compile(r"^(?:str|int|float|bool)$|\[")  # how pydantic names the alternatives of a field
SHOWN = 60  # letters of a value in a message


def folder_name(id: str) -> str:
    """The name of a cell, which is a folder and part of the host's options."""
    if not PLAIN.fullmatch(id):
        raise ValueError(f"'{id}' cannot be the name of a folder: letters, digits and . _ + = : @ - can")
    return id


Names = str | list[str]
Number = float | int
Id = Annotated[str, AfterValidator(folder_name)]
Share = Annotated[Number, Field(gt=0, le=1)]
Scalar = str | Number | bool


class Written(BaseModel):
    """By a person: nothing else may stand there."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Left(BaseModel):
    """By a program: what is not listed is not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


class CellEntry(Written):
    """One configuration of a sweep file."""

    pruning: str
    id: Id | None = None
    label: str | None = None
    pruning_args: dict[str, Any] | None = None
    seed: int | None = None
    keep: Share | None = None


class SweepFile(Written):
    """plugin_configs/sweeps, and a run folder's sweep.yaml."""

    model: str | None = None
    model_args: str | None = None
    tasks: Names | None = None
    limit: int | None = None
    options: dict[str, Any] | None = None
    launch: str | None = None
    jobs: int | None = None
    environment: dict[str, Scalar] | None = None
    gallery: bool | None = None
    pruning: Names | None = None
    keep: str | Number | list[str | Number] | None = None
    seeds: int = 1
    positions: str | None = None
    cells: list[CellEntry] | None = None
    without: Names | None = None
    version: Literal[1] = Field(1, alias="schema")


class SettingsEntry(Left):
    """A cell in a run folder's sweep.yaml."""

    id: Id


class Settings(Left):
    """What is read of a run folder's sweep.yaml."""

    tasks: list[str] | None = None
    cells: list[SettingsEntry]


class CellFile(Left):
    """cell.json."""

    id: Id
    label: str
    pruning: str
    pruning_args: dict[str, Any] = {}
    seed: int | None = None
    keep: Share | None = None
    status: Literal["done", "failed"] = "done"
    error: str | None = None
    command: list[str] = []


class Metric(Left):
    metric: str
    higher_is_better: bool | None = True


class Task(Left):
    metric_list: list[Metric] | None = None


class Samples(Left):
    effective: int


class Host(Left):
    model: str


class Ratio(Left):
    ratio: Number
    convention: str = ""


class Total(Left):
    total: int


class Seconds(Left):
    """Of the parts of all calls."""

    image_processing: Number = 0
    tower: Number = 0
    selector: Number = 0
    projector: Number = 0
    prefill: Number


class Median(Left):
    p50: Number


class Latency(Left):
    ttft: Median | Annotated[dict[str, Number], Field(max_length=0)] | None = None  # empty: nothing was timed
    ttft_spread: Number | None = None


class Machine(Left):
    cores: int
    threads: int
    load: list[Number] | None = None


class Model(Left):
    device: str | None = None
    family: str | None = None


class Chosen(Left):
    """One strategy of a run."""

    name: str
    config: dict[str, Any] = {}
    positions: str | None = None


class Record(Left):
    """The parts of the record (docs/record.md) that are compared; what is there must not be null."""

    visual_tokens: dict[str, Number]
    samples: Total
    strategies: list[Chosen] = []
    prefill_flops: Ratio = None
    kv_cache_bytes: Ratio = None
    seconds: Seconds = None
    latency: Latency = None
    machine: Machine = None
    model: Model = None
    versions: dict[str, Any] = {}


class Results(Left):
    """The host's results file."""

    configs: dict[str, Task]
    asked: dict[str, Samples] = Field(alias="n-samples")
    config: Host
    model_name: str
    pruning: Record


class Counted(Left):
    """One image."""

    before: Number
    after: Number


class Prompt(Left):
    """Tokens of one prompt."""

    before: Number
    mean_over_layers: Number = None


class Report(Left):
    """A question's part of the record."""

    images: list[Counted] = []
    prompt_tokens: Prompt = None


class Line(Left):
    """One question of the host's sample log."""

    doc_id: int
    target: Any
    filtered_resps: Any
    pruning: Report = None


Kind = TypeVar("Kind", bound=BaseModel)


def checked(kind: type[Kind], content: Any, source: str = "") -> Kind:
    """The content as the types say. PruningError naming the source, the field and the value if it is something else."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise PruningError(": ".join(filter(None, [source, _first(error)]))) from None


def _first(error: ValidationError) -> str:
    """The first problem: where it is, what is wanted, what was found."""
    problems = error.errors(include_url=False)
    place = _place(problems[0]["loc"], problems[0]["type"] == "missing" and problems[0]["loc"][-1])
    same = [each for each in problems if _place(each["loc"]) == _place(problems[0]["loc"])]
    wanted = " or ".join(dict.fromkeys(_wanted(each) for each in same))
    if problems[0]["type"] == "missing":
        return f"{place} is missing"
    if problems[0]["type"] == "value_error":
        return wanted
    return f"{place or 'the content'} must be {wanted}, got {one_line(repr(problems[0]['input']))[:SHOWN]}"


def _place(parts: Iterable[Any], last: Any = None) -> str:
    """configs.TASK.metric_list.0, without the names of alternatives that pydantic adds."""
    return ".".join(str(part) for part in parts if part == last or not KIND.search(str(part)))


WORDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
    "extra_forbidden": "left out",
}


def _wanted(problem: Mapping[str, Any]) -> str:
    said = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return WORDS.get(problem["type"], said)
