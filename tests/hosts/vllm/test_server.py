"""A server of its own process: requests over the OpenAI-compatible interface, one worker and two."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import ANSWER, LEAVES_MEMORY, WHOLE, Request, expected, one_each, prompt, reference, scenes

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.serving import Server, serving
from vtp_plugin.tiny.checkpoint import resolve

SETTINGS = {"strategy": "atp", "keep_ratio": 0.25, "alpha": 0.9}
KEPT = 36
OPTIONS = ["--dtype", "float32", "--max-model-len", "640", "--max-num-seqs", "8", "--enforce-eager"]
OPTIONS += ["--limit-mm-per-prompt", '{"image": 2}']


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=LEAVES_MEMORY)], ids=["1 worker", "2 workers"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model behind ATP, on one or two tensor-parallel workers."""
    log = tmp_path_factory.mktemp("server") / "log"
    workers = ["--tensor-parallel-size", str(request.param)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
        with serving(str(resolve("vtp-tiny", "hf")), SETTINGS, [*OPTIONS, *workers], log) as running:
            yield running


def text(ids: list[int]) -> str:
    return reference()[1].tokenizer.decode(ids, skip_special_tokens=True).strip()


def unpruned_length(request: Request) -> int:
    processor = reference()[1]
    return len(processor(images=list(request[0]), text=prompt(request))["input_ids"][0])


def test_concurrent_requests_with_several_images_and_questions(server: Server):
    (first, one), (second, two) = scenes(2)
    requests = [*one_each(4), ([first], one[1]), ([first], one[2]), ([second], one[0]), ([first, second], two[0])]
    said, _ = expected(SETTINGS, requests)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: server.ask(*request, ANSWER, add_special_tokens=True), requests))
    assert [content(answer) for answer in answers] == [text(ids) for ids in said]
    for answer, request in zip(answers, requests, strict=True):
        images = len(request[0])
        assert answer["usage"]["prompt_tokens"] == unpruned_length(request) - images * (WHOLE - KEPT)


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"].strip()


def test_a_server_that_refuses_its_configuration_does_not_start(tmp_path: Path):
    with (
        pytest.raises(PruningError, match="the server did not start: vllm: error: vtp_pruning: unknown strategy 'apt'"),
        serving(str(resolve("vtp-tiny", "hf")), {"strategy": "apt"}, OPTIONS, tmp_path / "log"),
    ):
        pass
    assert "Traceback" not in (tmp_path / "log").read_text()
