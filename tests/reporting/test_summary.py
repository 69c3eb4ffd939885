"""The line that every pruned run ends with."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtp_plugin import prune
from vtp_plugin.config import describe, resolve
from vtp_plugin.reporting import summary
from vtp_plugin.reporting.record import record, samples_of
from vtp_plugin.tiny.examples import examples
from vtp_plugin.tiny.inference import answer, load

ENTRY = {
    "visual_tokens": {"mean_before": 144.0, "mean_after": 86.0},
    "samples": {"total": 500, "with_images": 500, "pruned": 500},
    "seconds": {"selector": 0.6},
    "prefill_flops": {"before": 100, "after": 79},
    "kv_cache_bytes": {"before": 10, "after": 7},
}
SAID = "144 -> 86 visual tokens per image, prefill FLOPs 0.79x, KV 0.70x, selector 1.2 ms, 500 of 500 samples pruned"


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load()


def said(spec: str, entry: dict[str, Any], *where: str) -> str:
    return summary.line(describe(resolve(spec)), entry, *where)


def test_the_line_says_what_was_cut_and_saved() -> None:
    assert said("atp", ENTRY, "out/run") == f"atp 0.6: {SAID}; record: out/run"
    assert said("vprune+fastv", ENTRY) == f"vprune + fastv 0.5: {SAID}"
    assert said("visionzip", ENTRY).startswith("visionzip 64: ")


def test_what_a_host_does_not_measure_is_left_out() -> None:
    served = {key: ENTRY[key] for key in ("visual_tokens", "samples")} | {
        "prompt_tokens": {"before": 200, "after": 150}
    }
    expected = "atp 0.6: 144 -> 86 visual tokens per image, prompts 0.75x, 500 of 500 samples pruned"
    assert said("atp", served) == expected
    assert said("none", ENTRY) == "unpruned: 86 visual tokens per image"
    blind = ENTRY | {"samples": {"total": 3, "with_images": 0, "pruned": 0}}
    assert said("atp", blind) == "atp 0.6: 3 samples, none with an image"


@pytest.mark.parametrize("spec", ["atp", "l2+fastv", "visionzip", "none"])
def test_python_and_the_record_say_the_same(tiny: tuple[Any, Any], spec: str) -> None:
    model, processor = tiny
    reports: list[dict[str, Any]] = []
    with prune(model, spec, processor=processor, measure=True) as pruned:
        pruned.finished.append(lambda call: reports.extend(samples_of(pruned, call)))
        for picture, question, _ in examples(2):
            answer(model, processor, picture, question)
        entry = record(pruned, reports)
        found = pruned.summary()
    assert found == summary.line(entry["strategies"], entry)
    assert ("2 of 2 samples pruned" in found) == (spec != "none")


def test_before_the_first_call_nothing_is_claimed(tiny: tuple[Any, Any]) -> None:
    with prune(tiny[0], "atp", processor=tiny[1]) as pruned:
        assert pruned.summary() == "atp 0.6: 0 samples, none with an image"


def test_where_the_record_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    entry = ENTRY | {"strategies": describe(resolve("atp"))}
    summary.show(entry, SimpleNamespace(output_path=str(tmp_path)))
    assert capsys.readouterr().out.endswith(f"; record: {tmp_path}/\n")
    summary.show(entry, SimpleNamespace(output_path=None))
    assert re.search(r"record: not kept \(say --output_path FOLDER\)$", capsys.readouterr().out.strip())
