"""What an attached model answers with: the host's own output classes, under today's names and those of yesterday."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, Processor
from family_runs import batched, prompts_of
from models import tiny
from torch import nn

import vtp_plugin as vtp
from vtp_plugin.surgery import cache as kv

CASES = {
    "none": ("none", {}),
    "stride": ("stride", {"keep_ratio": 0.5}),
    "fastv": ("fastv", {"layer": 3, "keep_ratio": 0.5}),
}
NEW = 3
# Families whose output never had image_hidden_states.
WITHOUT = ("qwen", "glm", "llava_onevision", "llava_next_video", "minicpmv")
RUNS = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in FAMILIES
    for case in CASES
    if case != "fastv" or "llm" in FAMILIES[name].stages
]


@cache
def model_of(name: str) -> nn.Module:
    return FAMILIES[name].build("sdpa")


def forward(name: str) -> Any:
    with torch.no_grad():
        return model_of(name)(**batched(FAMILIES[name], prompts_of(name, "batch")), use_cache=True)


def generate(name: str) -> Any:
    inputs = batched(FAMILIES[name], prompts_of(name, "batch"))
    return model_of(name).generate(**inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)


def lengths_of(output: Any) -> list[int]:
    """Columns in the cache of every layer that keeps any; recurrent ones do not."""
    return [layer.keys.shape[2] for layer in output.past_key_values.layers if hasattr(layer, "keys")]


@pytest.mark.covering("name call", "call case")
@pytest.mark.parametrize("call", [forward, generate])
@pytest.mark.parametrize(("name", "case"), RUNS)
def test_the_output_is_the_hosts(name: str, call: Callable[[str], Any], case: str) -> None:
    """Its class, its keys, and a cache that is the same object under both of its names."""
    host = call(name)
    spec, fields = CASES[case]
    with vtp.prune(model_of(name), spec, processor=Processor(), **fields):
        ours = call(name)
    assert type(ours) is type(host)
    assert list(ours.keys()) == list(host.keys())
    assert ours.past_key_values is kv.of_output(ours) is not None
    lengths, before = lengths_of(ours), lengths_of(host)
    assert (lengths == before) is (case == "none")
    assert lengths[-1] <= before[-1]


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith(WITHOUT)])
def test_image_hidden_states_are_the_features_that_are_left(name: str) -> None:
    """For every family whose output has the field under all releases that are supported."""

    def rows() -> torch.Tensor:
        given = forward(name).image_hidden_states
        given = getattr(given, "pooler_output", given)  # SmolVLM's of 5.18 and 5.19 is the whole of the features
        parts = [given] if isinstance(given, torch.Tensor) else given
        return torch.cat([part.flatten(0, -2) for part in parts])

    host = rows()
    with vtp.prune(model_of(name), "none"):
        assert torch.equal(rows(), host)
    with vtp.prune(model_of(name), "stride", keep_ratio=0.5):
        left = rows()
    assert len(left) < len(host)
    assert all((host == row).all(-1).any() for row in left)  # each of them is one of the host's


class Listener(logging.Handler):
    """Everything that transformers logs and Python warns of, without its place."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.add(record.getMessage())


def heard(call: Callable[[], Any]) -> set[str]:
    """What is said during a call, also what is said only once in a process."""
    from transformers.utils import logging as said

    said.warning_once.cache_clear()
    logger, listener = logging.getLogger("transformers"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    return listener.heard | {str(warning.message) for warning in caught}


@pytest.mark.covering
@pytest.mark.parametrize(("name", "case"), RUNS)
def test_nothing_is_said_that_the_host_does_not_say_by_itself(name: str, case: str) -> None:
    spec, fields = CASES[case]

    def attached() -> None:
        with vtp.prune(model_of(name), spec, processor=Processor(), measure=True, **fields):
            generate(name), forward(name)

    assert heard(attached) <= heard(lambda: (generate(name), forward(name)))


@pytest.mark.parametrize("case", CASES)
def test_the_authors_package_says_nothing_new_either(case: str) -> None:
    pytest.importorskip("llava")
    from models import prompts

    host, (spec, fields) = tiny("llava"), CASES[case]

    def attached() -> None:
        with host.prune(spec, **fields):
            host.generate(prompts("batch"))

    assert not {line for line in heard(attached) if "past_key_values" in line or "deprecat" in line}
