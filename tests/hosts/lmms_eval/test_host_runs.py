"""Runs of lmms-eval that would prove nothing, or prove it about the wrong sample: right, or a failure that shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmms
import pytest
from lmms import SETTINGS, TINY, VPRUNE, kept_by_vprune, lines

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval import proof, status
from vtp_plugin.hosts.lmms_eval.requests import by_task

pytest.importorskip("lmms_eval")

TASKS = ("vtp_scenes_presence", "vtp_scenes_count", "vtp_scenes_position")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a data cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- which sample is which --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "batch_size"), SETTINGS)
def test_a_batch_over_several_tasks_keeps_every_record(model: str, batch_size: int) -> None:
    results = lmms.evaluate(model, f"{TINY},{VPRUNE}", ",".join(TASKS), limit=3, batch_size=batch_size)
    assert results["pruning"]["samples"]["total"] == 9
    for task in TASKS:
        found = [line["pruning"]["images"] for line in lines(results, task)]
        assert found == [[{"before": 144, "after": kept_by_vprune(number)}] for number in range(3)]


def test_requests_come_a_task_at_a_time_and_answers_in_their_order() -> None:
    requests = [SimpleNamespace(task_name=name, doc_id=number) for number, name in enumerate("abacb")]
    asked: list[set[str]] = []

    def ask(part: Any) -> list[str]:
        asked.append({request.task_name for request in part})
        return [f"{request.task_name}{request.doc_id}" for request in part]

    assert by_task(ask, requests) == ["a0", "b1", "a2", "c3", "b4"]
    assert asked == [{"a"}, {"b"}, {"c"}]


# -- what raises while the host asks ----------------------------------------------------------------------------------


def raising(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("in our own bookkeeping")


BOOKKEEPING = {
    "the report of a call": ("vtp_plugin.hosts.lmms_eval.evaluation.samples_of", raising),
    "the document behind it": ("vtp_plugin.hosts.lmms_eval.documents.Fetched.take", raising),
    "before the call begins": ("vtp_plugin.adapters.llava_hf.LlavaHf.has_images", raising),
}


@pytest.mark.parametrize("where", BOOKKEEPING)
def test_our_own_errors_fail_the_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's class answers "" to every exception of `generate`: an accuracy of 0, as of a bad model."""
    monkeypatch.setattr(*BOOKKEEPING[where])
    with pytest.raises(PruningError, match=r"met an error while generating; the first: .*in our own bookkeeping"):
        lmms.evaluate("llava_hf", f"{TINY},pruning=stride", limit=2)


def test_an_error_in_a_changed_picture_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtp_plugin.hosts.lmms_eval.perturb.Perturbation.picture", raising)
    with pytest.raises((PruningError, ZeroDivisionError), match="in our own bookkeeping"):
        lmms.evaluate("llava_hf", f"{TINY},pruning=stride,pruning.perturb=noise:1", limit=1)


# -- runs that prove nothing ------------------------------------------------------------------------------------------


def test_a_task_without_pictures_is_refused(workplace: Path) -> None:
    lmms.write_tasks(workplace)
    text_only = {"offset": len(lmms.SIZES), "limit": 2, "gen_kwargs": "max_new_tokens=2"}
    with pytest.raises(PruningError, match="stride: none of 2 questions showed a picture: nothing was pruned"):
        lmms.evaluate("llava", f"{TINY},pruning=stride", "scienceqa_img", **text_only)
    whole = lmms.evaluate("llava", f"{TINY},pruning=none", "scienceqa_img", **text_only)
    assert whole["pruning"]["samples"] == {"total": 2, "with_images": 0, "pruned": 0}


def test_one_of_several_that_never_cuts_is_named(workplace: Path) -> None:
    """Noise, of which V-PRUNE cuts nothing; FastV cuts all the same."""
    lmms.write_tasks(workplace, flat=False)
    strict = "pruning=vprune+fastv,pruning.cosine_threshold=1,pruning.chi2_threshold=0"
    with pytest.raises(PruningError, match=r"^vprune: 1 images went in and not one token was cut"):
        lmms.evaluate("llava", f"{TINY},{strict}", "pope", limit=1, gen_kwargs="max_new_tokens=2")


def test_one_that_keeps_everything_beside_one_that_cuts_is_allowed() -> None:
    results = lmms.evaluate("llava_hf", f"{TINY},pruning=l2+fastv,pruning.l2.keep_ratio=1", limit=1)
    assert results["pruning"]["samples"]["pruned"] == 1


def test_thresholds_may_find_nothing_where_that_is_a_result(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vtp_plugin import get_strategy

    whole = [{"task": "a", "doc_id": 0, "images": [{"before": 144, "after": 144}]}]
    with pytest.raises(PruningError, match="vprune: 1 images went in and not one token was cut"):
        proof.check([get_strategy("vprune")()], whole, [proof.Seen(whole, 1)], cached=False)
    monkeypatch.setenv(proof.IDLE, "1")
    proof.check([get_strategy("vprune")()], whole, [proof.Seen(whole, 1)], cached=False)
    assert [line.strip() for line in said] == ["vtp-plugin: vprune kept everything: it found nothing to drop"]
    with pytest.raises(PruningError, match="fastv: 1 images went in"):  # a budget is one all the same
        proof.check([get_strategy("fastv")(keep_ratio=0.5)], whole, [proof.Seen(whole, 1)], cached=False)


SEEN = [{"task": "a", "doc_id": 0, "images": [{"before": 9, "after": 3}]}, {"task": "b", "doc_id": 0, "images": []}]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the host's log is told."""
    from loguru import logger

    found: list[str] = []
    sink = logger.add(found.append, format="{message}")
    yield found
    logger.remove(sink)


def test_a_task_without_pictures_among_others_is_named(said: list[str]) -> None:
    from vtp_plugin import get_strategy

    proof.check([get_strategy("l2")()], SEEN, [proof.Seen(SEEN, 2)], cached=False)
    assert [line.strip() for line in said] == ["vtp-plugin: b showed no picture: nothing was pruned there"]


def test_a_ratio_that_rounds_to_all_tokens_is_what_was_asked_for(said: list[str]) -> None:
    from vtp_plugin import get_strategy

    whole = [{"task": "a", "doc_id": 0, "images": [{"before": 144, "after": 144}]}]
    proof.check([get_strategy("fastv")(keep_ratio=0.997)], whole, [proof.Seen(whole, 1)], cached=False)
    assert [line.strip() for line in said] == ["vtp-plugin: fastv kept everything: keep_ratio=0.997 rounds to that"]
    with pytest.raises(PruningError, match="fastv: 1 images went in and not one token was cut"):
        proof.check([get_strategy("fastv")(keep_ratio=0.99)], whole, [proof.Seen(whole, 1)], cached=False)


@pytest.mark.parametrize(("requests", "cached"), [(3, True), (3, False), (0, False)])
def test_answers_without_a_call_of_the_model_are_refused(requests: int, cached: bool) -> None:
    from vtp_plugin import get_strategy

    with pytest.raises(PruningError, match="l2: the model answered without a call that could be pruned"):
        proof.check([get_strategy("l2")()], [], [proof.Seen(requests=requests)], cached=cached)


# -- what the host's process tells ------------------------------------------------------------------------------------


def test_the_command_line_tells_how_far_it_is(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two evaluations in one process, the second of which is refused by the model: a line each, and exit code 1."""
    from lmms_eval.__main__ import cli_evaluate

    told = status.Reader(workplace / "status")
    monkeypatch.setenv(status.VARIABLE, str(told.path))
    runs = [
        {"model": "llava_hf", "model_args": TINY, "tasks": TASKS[0], "limit": 2, "pruning": name, "output_path": name}
        for name in ("stride", "fastv")
    ]
    runs[1]["pruning_args"] = {"layer": 99}
    (workplace / "runs.yaml").write_text(json.dumps(runs))
    monkeypatch.setattr("sys.argv", ["lmms-eval", "--config", "runs.yaml", "--verbosity", "ERROR"])
    with pytest.raises(SystemExit) as stopped:
        cli_evaluate()
    assert stopped.value.code == 1
    events = [(line["cell"], line["event"], line.get("done"), line.get("of")) for line in told.new()]
    answered = [("stride", "answered", 1, 2), ("stride", "answered", 2, 2)]
    assert events[:-1] == [("stride", "started", None, None), *answered, ("fastv", "started", None, None)]
    assert events[-1][:2] == ("fastv", "failed")
    assert not list(told.new())
    error = capsys.readouterr().err
    assert "lmms-eval: error: fastv: " in error
    assert "Traceback" not in error


def test_a_line_that_is_being_written_is_read_later(tmp_path: Path) -> None:
    told = status.Reader(tmp_path / "status")
    assert not list(told.new())
    status.say(status.STARTED, {status.VARIABLE: str(told.path)})
    with told.path.open("a") as file:
        file.write('{"cell": "a"')
    assert [line["event"] for line in told.new()] == ["started"]
    with told.path.open("a") as file:
        file.write(', "event": "failed"}\n')
    assert [line["event"] for line in told.new()] == ["failed"]


class Records(logging.Handler):
    """Keeps what a logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.mark.parametrize("arguments", ["", ",pruning=atp"])
def test_the_embedded_model_comes_without_a_table_of_weights(arguments: str) -> None:
    """Its CLIP is read in halves; a table that says that something is missing would be shown."""
    from transformers import CLIPVisionModel

    from vtp_plugin.hosts.transformers.quiet import REPORT, REPORTERS
    from vtp_plugin.tiny.checkpoint import resolve

    heard = Records()
    loggers = [logging.getLogger(name) for name in REPORTERS]
    for logger in loggers:
        logger.addHandler(heard)
    try:
        lmms.evaluate("llava", f"{TINY}{arguments}", limit=1)
        assert not [line for line in heard.said if REPORT in line]
        CLIPVisionModel.from_pretrained(resolve("vtp-tiny", "clip"))  # by somebody else
        assert [line for line in heard.said if REPORT in line]
    finally:
        for logger in loggers:
            logger.removeHandler(heard)
