"""Files of settings and results: one way to read YAML and JSON, one way to write, checked before the work starts.

YAML is read strictly: UTF-8, text as keys, no key twice, no tags, no dates, numbers that a computer can hold. What is
wrong is one sentence with the file's name in front.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from threading import get_ident
from typing import Any

import yaml

from vtp_plugin.errors import PruningError, one_line

LARGEST = 8 * 2**20  # bytes of a file of settings
DEEPEST, MOST = 32, 200_000  # levels, and values with aliases written out, of a file of settings
INTEGER = re.compile(r"^[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|[0-9]+)$")
MERGE = "tag:yaml.org,2002:merge"
REAL = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
SAME_NUMBER = 2**63  # larger whole numbers are refused
BLOCK = b" " * 4096  # written and deleted again, to see whether a folder takes files


# -- reading ----------------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. PruningError with the file's name for one that cannot be read or is not plain."""
    text = read_text(Path(path), LARGEST)
    try:
        return parse_yaml(text)
    except PruningError as error:
        raise PruningError(f"{path}: {error}") from None


def parse_yaml(text: str) -> Any:
    """Plain YAML: mappings with text as keys, lists, text, numbers, true, false and null. PruningError for the rest."""
    try:
        content = yaml.load(text, _Plain)
    except yaml.MarkedYAMLError as error:
        raise PruningError(f"not valid YAML ({_problem(error)})") from None
    except yaml.YAMLError as error:
        raise PruningError(f"not valid YAML ({one_line(str(error))})") from None
    except RecursionError:
        raise PruningError(f"not valid YAML (more than {DEEPEST} levels)") from None
    _measure(content, DEEPEST, [MOST])
    return content


def read_json(path: str | Path, missing: str = "not there") -> dict[str, Any]:
    """A JSON object. PruningError with the file's name for one that cannot be read."""
    content = _json(Path(path), missing, json.loads)
    if not isinstance(content, dict):
        raise PruningError(f"{path}: expected a JSON object")
    return content


def read_json_lines(path: str | Path, missing: str = "not there") -> list[dict[str, Any]]:
    """One JSON object per line. PruningError with the file's name for one that cannot be read."""
    lines = _json(Path(path), missing, lambda text: [json.loads(line) for line in text.split("\n") if line.strip()])
    if not all(isinstance(line, dict) for line in lines):
        raise PruningError(f"{path}: expected a JSON object per line")
    return lines


def _json(path: Path, missing: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(read_text(path, missing=missing))
    except PruningError:
        raise
    except (ValueError, RecursionError) as error:
        raise PruningError(f"{path}: half-written, not valid JSON ({one_line(str(error))})") from None


def read_text(path: Path, largest: float = math.inf, missing: str = "not found") -> str:
    """The text of a file in UTF-8. PruningError with the file's name for one that cannot be read."""
    try:
        if not path.exists():
            raise PruningError(f"{path}: {missing}")
        if not path.is_file():
            raise PruningError(f"{path}: not a file")
        if path.stat().st_size > largest:
            raise PruningError(f"{path}: larger than {largest / 2**20:g} MB, this is no file of settings")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PruningError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        if isinstance(error, PruningError):
            raise
        raise PruningError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _measure(value: Any, levels: int, left: list[int]) -> None:
    """Refuse what is too deep, or too much once its aliases are written out (a value inside itself is both)."""
    left[0] -= 1
    if levels < 0 or left[0] < 0:
        raise PruningError(f"not valid YAML (more than {DEEPEST} levels or {MOST} values)")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _measure(part, levels - 1, left)


class _Plain(yaml.SafeLoader):
    """YAML without tags, dates, sexagesimal numbers and repeated keys; 5e-1 is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: dict[Any, Any] = {}

    def plain_mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        self.check_keys(node)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def check_keys(self, node: yaml.MappingNode) -> None:
        """Text, each once; of those that are merged in with `<<`, too, but for what stands beside it."""
        lines: dict[Hashable, int] = {}
        merged = [value for key, value in node.value if key.tag == MERGE]
        parts = [part for value in merged for part in (value.value if value.id == "sequence" else [value])]
        inside = [key for part in parts if isinstance(part, yaml.MappingNode) for key, _ in part.value]
        names = [str(key.value) for key in inside]
        if twice := next((key for key in inside if names.count(str(key.value)) > 1), None):
            raise _refused(f"'{twice.value}' is merged in twice", twice)
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if key.tag != "tag:yaml.org,2002:str":
                said = key.value if isinstance(key.value, str) else key.id
                raise _refused(f"the key {said} is no text: put it into quotes", key)
            if key.value in lines:
                raise _refused(f"'{key.value}' is given twice, in line {lines[key.value]} and here", key)
            lines[key.value] = key.start_mark.line + 1

    def plain_list(self, node: yaml.SequenceNode) -> list[Any]:
        return [self.construct_object(part, deep=True) for part in node.value]

    def plain_integer(self, node: yaml.ScalarNode) -> int:
        if not INTEGER.match(node.value):
            raise _refused(f"'{node.value}' is no number", node)
        base = {"x": 16, "o": 8}.get(node.value.lstrip("+-")[1:2], 10)
        number = int(node.value, base) if len(node.value) < 40 else SAME_NUMBER
        if abs(number) >= SAME_NUMBER:
            raise _refused("a number of that size is not possible here", node)
        return number

    def plain_real(self, node: yaml.ScalarNode) -> float:
        text = node.value.lower()
        if not REAL.match(text):
            raise _refused(f"'{text}' is no number", node)
        if text.endswith(("inf", "nan")) or math.isinf(float(text)):
            raise _refused("a number has to be finite", node)
        return float(text)

    def plain_bool(self, node: yaml.ScalarNode) -> bool:
        if node.value.lower() not in self.bool_values:
            raise _refused(f"'{node.value}' is neither true nor false", node)
        return self.bool_values[node.value.lower()]

    def no_tag(self, node: yaml.Node) -> Any:
        raise _refused(f"tags such as {node.tag.replace('tag:yaml.org,2002:', '!!')} are not read", node)


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _problem(error: yaml.MarkedYAMLError) -> str:
    said, mark = error.problem or error.context or "", error.problem_mark or error.context_mark
    return one_line(said) + (f", line {mark.line + 1}" if mark else "")


for _tag, _construct in {
    "map": _Plain.plain_mapping,
    "seq": _Plain.plain_list,
    "str": yaml.SafeLoader.construct_yaml_str,
    "int": _Plain.plain_integer,
    "float": _Plain.plain_real,
    "bool": _Plain.plain_bool,
    "null": yaml.SafeLoader.construct_yaml_null,
}.items():
    _Plain.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
_Plain.add_constructor(None, _Plain.no_tag)
_Plain.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
_Plain.add_implicit_resolver("tag:yaml.org,2002:float", REAL, list("-+.0123456789"))


# -- writing ----------------------------------------------------------------------------------------------------------


def check_output(path: str | Path, *, kinds: tuple[str, ...] = (), read: Sequence[Path] = ()) -> Path:
    """The path, if a file can be written there: to be asked before the work.

    `kinds`: the endings that are possible. `read`: files that the work reads, in whose place it must not write.
    """
    path = Path(path)
    if kinds and path.suffix.lower() not in kinds:
        raise PruningError(f"cannot write '{path}': its name must end in {' or '.join(kinds)}")
    with _speaking(path):
        target = _target(path)
        if target.is_dir():
            raise PruningError(f"cannot write '{path}': it is a folder, a file is wanted")
        if target.exists() and not target.is_file():
            raise PruningError(f"cannot write '{path}': it is no ordinary file")
        if target.exists() and not os.access(target, os.W_OK):
            raise PruningError(f"cannot write '{path}': it is read-only")
        if not target.parent.is_dir():
            shown = target.parent if path.is_symlink() else path.parent
            raise PruningError(f"cannot write '{path}': no such folder: {shown}")
        if any(target == _target(Path(one)) for one in read):
            raise PruningError(f"cannot write '{path}': it is read, too")
        _try(target.parent, target.name)
    return path


def _target(path: Path) -> Path:
    """The file that a path stands for, links followed."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise PruningError(f"cannot write '{path}': a link that leads to itself")
    return target


def check_folder(path: str | Path) -> Path:
    """The path, if a folder with files can be made there, or is there: to be asked before the work."""
    path = Path(path)
    with _speaking(path):
        there = path.absolute()
        while not there.exists() and not there.is_symlink():
            there = there.parent
        if not there.is_dir():
            raise PruningError(f"cannot write into '{path}': '{there}' is no folder")
        _try(there, max(path.absolute().relative_to(there).parts or ("x",), key=lambda part: len(part.encode())))
    return path


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all; PruningError if the disk does not take it."""
    path = Path(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with _speaking(path):
        target = _target(path)
        draft = target.with_name(f".{os.getpid()}-{get_ident()}.part")
        try:
            draft.write_bytes(data)
            if target.exists():
                shutil.copymode(target, draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """JSON with an indent, whole or not at all."""
    write(path, json.dumps(content, indent=1) + "\n")


def _try(folder: Path, name: str) -> None:
    """Whether the folder takes a file of that name; nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix=".vtp-", dir=folder) as aside:
        (Path(aside) / name).write_bytes(BLOCK)


class _speaking:
    """Errors of the system about a path become one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, PruningError):
            raise PruningError(f"cannot write '{self.path}': {getattr(error, 'strerror', None) or error}") from None
