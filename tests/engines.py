"""Engines of the embedded model, and the same questions answered by transformers. All fp32, on the CPU.

Engines run in this process, so that a test can look at the model inside; the tests of servers and of several workers
start processes of their own.
"""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as parquet
import pytest
import served_internvl
from PIL import Image

from vtp_plugin import prune
from vtp_plugin.hosts.lmms_eval.plugin import TASKS
from vtp_plugin.tiny.checkpoint import resolve

IMAGE_TOKEN, WHOLE = 800, 144  # of the embedded model: id of a placeholder, tokens of an image
ENGINE = {"dtype": "float32", "max_model_len": 640, "max_num_seqs": 8, "enforce_eager": True, "seed": 0}
ANSWER = 6  # tokens that are compared
KERNELS = "register_triton_kernel_overrides"
LEAVES_MEMORY = pytest.mark.xdist_group("memory")  # vLLM's workers on CPUs do: never beside a test that looks for some

Request = tuple[Sequence[Image.Image], str]  # pictures and a question about them


@cache
def scenes(number: int = 6) -> list[tuple[Image.Image, list[str]]]:
    """The first test scenes, with the questions that the tasks ask about them."""
    rows = parquet.read_table(TASKS / "vtp_scenes" / "scenes.parquet").slice(0, number).to_pylist()
    asked = [[value for name, value in row.items() if name.endswith("question")] for row in rows]
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    return list(zip(pictures, asked, strict=True))


def prompt(request: Request) -> str:
    """In the embedded model's chat template."""
    images, question = request
    return "USER: " + "<image>\n" * len(images) + question + " ASSISTANT:"


def one_each(number: int = 4) -> list[Request]:
    """A picture and a question per request, every kind of question in turn."""
    return [([picture], questions[at % len(questions)]) for at, (picture, questions) in enumerate(scenes(number))]


# -- vLLM --------------------------------------------------------------------------------------------------------------


@contextmanager
def engine(settings: Mapping[str, Any] | None, model: Path | None = None, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` of the embedded model, or of another folder, with this `vtp_pruning`."""
    from vllm import LLM

    overrides = {"hf_overrides": {"vtp_pruning": dict(settings)}} if settings else {}
    limit = {"limit_mm_per_prompt": {"image": 2}, "kv_cache_memory_bytes": 2**26}
    with _small():
        llm = LLM(str(model or resolve("vtp-tiny", "hf")), **{**ENGINE, **limit, **overrides, **arguments})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def _small() -> Iterator[None]:
    """What an engine of a tiny model would cost most is left out: a cache of a GiB, and what was done before it.

    vLLM collects garbage while it starts and ends, and lets go what was frozen before: what is there now stays frozen.
    It looks for its kernels in all modules, to put those for CPUs in their places, where they are from then on.
    """
    from vllm.platforms.cpu import CpuPlatform

    gc.collect()  # the engine before this one
    gc.freeze()
    with (
        patch.object(gc, "freeze"),
        patch.object(gc, "unfreeze"),
        patch.object(CpuPlatform, KERNELS, staticmethod(_kernels())),
        patch.dict(os.environ),
    ):
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # outranks the size that an engine is given
        yield


@cache
def _kernels() -> Callable[[], None]:
    """What puts the kernels for CPUs in their places, the first time."""
    from vllm.platforms.cpu import CpuPlatform

    return cache(getattr(CpuPlatform, KERNELS))


def ask(llm: Any, requests: Sequence[Request], write: Callable[[Request], str] = prompt, **inputs: Any) -> list[Any]:
    """vLLM's outputs for requests that are sent together."""
    from vllm import SamplingParams

    given = [{"prompt": write(r), "multi_modal_data": {"image": list(r[0])}, **inputs} for r in requests]
    return llm.generate(given, SamplingParams(temperature=0, max_tokens=ANSWER, logprobs=0), use_tqdm=False)


def answers(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs(outputs: Sequence[Any]) -> list[list[float]]:
    """Of the tokens of the answers."""
    each = [zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True) for output in outputs]
    return [[found[token].logprob for token, found in answer] for answer in each]


def columns(outputs: Sequence[Any], token: int = IMAGE_TOKEN) -> list[int]:
    """How many placeholders each prompt had."""
    return [output.prompt_token_ids.count(token) for output in outputs]


def events(llm: Any) -> list[Any]:
    """The cuts that the model inside has made since the last question."""

    def taken(model: Any) -> list[Any]:
        found = list(model.vtp.events)
        model.vtp.events.clear()
        return found

    return llm.apply_model(taken)[0]


# -- transformers ------------------------------------------------------------------------------------------------------


@cache
def reference(folder: Path | None = None) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = folder or resolve("vtp-tiny", "hf")
    if (folder / served_internvl.SOURCE).is_dir():
        return served_internvl.loaded(folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def expected(
    settings: Mapping[str, Any], requests: Sequence[Request], folder: Path | None = None
) -> tuple[list[list[int]], list[list[Any]]]:
    """Answers and kept indices, per request, of the transformers path."""
    model, processor = reference(folder)
    hyper = {name: value for name, value in settings.items() if name != "strategy"}
    said, kept = [], []
    with prune(model, settings["strategy"], processor=processor, **hyper) as pruned:
        for request in requests:
            pruned.events.clear()
            inputs = processor(images=list(request[0]), text=prompt(request), return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER)[0, inputs["input_ids"].shape[1] :]
            said.append(until_end(ids.tolist()))
            kept.append([index.tolist() for event in pruned.events for index in event.kept])
    return said, kept


def until_end(ids: list[int]) -> list[int]:
    """Up to and including the end token, as vLLM reports it."""
    return ids[: ids.index(2) + 1] if 2 in ids else ids
