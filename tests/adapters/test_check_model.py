"""`vtp check-model`: the families of the package keep its promises, and every broken one is found and named."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import families
import pytest
import torch
from commands import ended, vtp
from example import on_the_path
from families import FAMILIES, VARIANTS
from matrix import dear
from torch import nn

from vtp_plugin import Stage, plugins
from vtp_plugin.adapter import Adapter
from vtp_plugin.errors import PruningError
from vtp_plugin.outcomes import outcomes
from vtp_plugin.promises import Case, checks, promises
from vtp_plugin.promises.case import load
from vtp_plugin.surgery.undo import Undo

CHECKED = ("llava_next", "qwen2_5_vl", "gemma3", "idefics3")  # one of every layout; make test-full has them all


def case_of(family: families.Family) -> Case:
    samples = [family.sample(0, 2), family.sample(1, 1)]
    batch, singles = family.batch(samples), [family.batch([sample]) for sample in samples]
    return Case(family.build("sdpa"), singles, batch, families.Processor(), layer=family.late, later=family.later)


@pytest.mark.parametrize("name", dear([*FAMILIES, *VARIANTS], CHECKED))
def test_families_of_the_package_keep_their_promises(name: str) -> None:
    found = list(promises(case_of({**FAMILIES, **VARIANTS}[name])))
    assert [outcome for outcome in found if not outcome.passed] == []
    assert len(found) == len(checks.CHECKS)
    able = [stage for stage in FAMILIES[name].stages if name != "gemma3" or stage != "llm"] if name in FAMILIES else []
    assert all(stage in found[-1].remark for stage in able)


# -- what is broken is found ------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example plugin's family and its small model, as an installed package would bring them."""
    with on_the_path(monkeypatch):
        from vtp_example import plugin, small

        plugins.manager().register(plugin, name="vtp_example")
        plugins.adapters.cache_clear()
        plugins.strategies.cache_clear()
        yield small
        plugins.manager().unregister(plugin)
    plugins.adapters.cache_clear()
    plugins.strategies.cache_clear()


def without_a_stage(case: Case, cls: type[Adapter], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cls, "stages", {stage: "" for stage in Stage if stage is not Stage.VIT})


def rows_in_another_order(case: Case, cls: type[Adapter], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cls, "arrange", lambda self, maps, kind, inputs: list(maps.flip(1)))


def the_rows_that_are_left_backwards(case: Case, cls: type[Adapter], patch: pytest.MonkeyPatch) -> None:
    original = cls.pack

    def pack(self: Any, rows: Any, kind: str, host: Any) -> Any:
        return original(self, rows if len(rows[0]) == host.shape[1] else [image.flip(0) for image in rows], kind, host)

    patch.setattr(cls, "pack", pack)


def something_left_behind(case: Case, cls: type[Adapter], patch: pytest.MonkeyPatch) -> None:
    original = cls.install

    def install(self: Any, pruned: Any, undo: Undo) -> None:
        original(self, pruned, undo)
        self.core.left = True

    patch.setattr(cls, "install", install)


def layers_that_are_never_called(case: Case, cls: type[Adapter], patch: pytest.MonkeyPatch) -> None:
    original = cls.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.decoder_layers = deepcopy(self.decoder_layers)

    patch.setattr(cls, "__init__", init)


def too_many_bytes(case: Case, cls: type[Adapter], patch: pytest.MonkeyPatch) -> None:
    report = checks.samples_of

    def wrong(*args: Any) -> Any:
        found = report(*args)
        found[0]["kv_cache_bytes"]["after"] += 8
        return found

    patch.setattr(checks, "samples_of", wrong)


def no_processor(case: Case, cls: type[Adapter], patch: pytest.MonkeyPatch) -> None:
    case.processor = None
    del case.adapter


BREAKS = [  # what is wrong, the check that says so, and what it says
    (without_a_stage, "is known", "stages says nothing of vit"),
    (no_processor, "is known", "pixels are judged with the processor's mean and standard deviation"),
    (rows_in_another_order, "generates", "away from the slow reference's"),
    (the_rows_that_are_left_backwards, "generates", "prompt 0: logits are"),
    (something_left_behind, "gives the model back", "leaves model.left changed"),
    (layers_that_are_never_called, "gives the model back", "nothing was cut at its llm stage"),
    (too_many_bytes, "reports the KV cache", "the record says"),
]


@pytest.mark.parametrize(("breaking", "check", "said"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_family_is_told_what_is_wrong(
    small: Any, breaking: Any, check: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small.build()
    breaking(case, type(case.adapter), monkeypatch)
    vars(case).pop("adapter", None)
    (asked,) = (one for one in checks.CHECKS if one.__doc__.startswith(check))
    (found,) = outcomes([asked], case, needed=asked)  # as `promises` does, without the others
    assert not found.passed
    assert said in found.remark


def test_a_model_that_no_family_knows_gets_no_further() -> None:
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    (outcome,) = promises(Case(nn.Linear(1, 1), [inputs]))
    assert not outcome.passed
    assert outcome.remark.startswith("no adapter knows the model Linear")


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_strangers_family_keeps_them_and_the_command_prints_every_check(small: Any) -> None:
    said = vtp("check-model", "vtp_example.small:build")
    assert said.count("ok  ") == len(checks.CHECKS)
    assert said.endswith("vtp_example.small:build: all checks passed\n")


MINE = """
from vtp_plugin.promises import Case
import torch
def build():
    return Case(torch.nn.Linear(1, 1), [{"input_ids": torch.ones(1, 3, dtype=torch.long)}])
def nothing():
    return None
def broken():
    raise ZeroDivisionError("in here")
def ids():
    return Case(torch.nn.Linear(1, 1), [{"pixel_values": torch.ones(1)}])
def pair():
    return Case(torch.nn.Linear(1, 1), [{"input_ids": torch.ones(2, 3, dtype=torch.long)}])
word = "word"
"""


@pytest.mark.parametrize(
    ("builder", "said"),
    [
        ("build", r"check-model takes module:builder, for example my_family\.py:build, got 'build'"),
        ("no_such_module:build", "no_such_module cannot be imported: ModuleNotFoundError: "),
        ("no_such_file.py:build", r"file not found: no_such_file\.py"),
        ("{}:missing", "has no function 'missing'"),
        ("{}:word", "has no function 'word'"),
        ("{}:nothing", r"must return a vtp_plugin\.promises\.Case, got NoneType"),
        ("{}:broken", "raised ZeroDivisionError: in here"),
        ("{}:ids", r"with input_ids \[B, L\]"),
        ("{}:pair", "prompts must be one sample each"),
    ],
)
def test_what_is_no_builder_is_refused(builder: str, said: str, tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    with pytest.raises(PruningError, match=said) as error:
        load(builder.format(path))
    assert "\n" not in str(error.value)


def test_a_family_that_fails_ends_with_1(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    result = ended("check-model", f"{path}:build")
    assert result.returncode == 1
    assert "1 checks failed" in result.stdout
    assert "Traceback" not in result.stderr
