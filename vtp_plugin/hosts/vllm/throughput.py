"""How much a server answers at several concurrencies, pruned and unpruned, measured from outside.

Every request has a picture of its own (noise), so that no cache answers for the model, and asks for a fixed number of
tokens. One server at a time; each concurrency is warmed up before it is measured.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vtp_plugin.hosts.vllm.serving import Server, as_url, serving

QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Answer:
    """One request, in seconds from its start."""

    first_token: float
    end: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Load:
    """What is asked of every server."""

    concurrencies: Sequence[int] = (1, 4, 16)
    requests: int = 32  # per concurrency
    tokens: int = 16  # per answer
    side: int = 336  # of the pictures, pixels


def measure(
    model: str, settings: Mapping[str, Any] | None, options: Sequence[str], load: Load, log: Path
) -> list[dict]:
    """One line per concurrency for one configuration of one server."""
    with serving(model, settings, options, log) as server:
        return [_line(server, settings, number, load) for number in load.concurrencies]


def _line(server: Server, settings: Mapping[str, Any] | None, concurrency: int, load: Load) -> dict[str, Any]:
    _run(server, concurrency, concurrency, load, seed=10_000 * concurrency)
    started = time.perf_counter()
    answers = _run(server, concurrency, load.requests, load, seed=20_000 * concurrency)
    seconds = time.perf_counter() - started
    return {
        "pruning": settings,
        "concurrency": concurrency,
        "requests": len(answers),
        "seconds": seconds,
        "requests_per_second": len(answers) / seconds,
        "answer_tokens_per_second": sum(a.answer_tokens for a in answers) / seconds,
        "first_token_seconds": median(a.first_token for a in answers),
        "end_seconds": median(a.end for a in answers),
        "prompt_tokens": median(a.prompt_tokens for a in answers),
    }


def _run(server: Server, concurrency: int, requests: int, load: Load, seed: int) -> list[Answer]:
    bodies = [_body(server, seed + number, load) for number in range(requests)]
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda body: _ask(server, body), bodies))


def _body(server: Server, seed: int, load: Load) -> bytes:
    """A request that streams exactly `load.tokens` tokens, about noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (load.side, load.side, 3), dtype=np.uint8)
    picture = {"type": "image_url", "image_url": {"url": as_url(Image.fromarray(noise))}}
    message = {"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}
    asked = {"model": server.name, "messages": [message], "max_tokens": load.tokens, "ignore_eos": True}
    return json.dumps({**asked, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}).encode()


def _ask(server: Server, body: bytes) -> Answer:
    address, headers = f"{server.address}/v1/chat/completions", {"Content-Type": "application/json"}
    started, first, usage = time.perf_counter(), None, {}
    with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - started
                usage = json.loads(line.removeprefix(b"data: ")).get("usage") or usage
    return Answer(first, time.perf_counter() - started, usage["prompt_tokens"], usage["completion_tokens"])
