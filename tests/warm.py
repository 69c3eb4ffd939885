"""lmms-eval without the fourteen seconds of its start: forked from a process that has it imported and its tasks read.

`python()` is what stands for `python` in `python -m lmms_eval ...`: a client that hands its arguments, folder,
environment and output to a waiting process and ends as the one that is forked there. One waits for all test processes
of a run, or for the single one. Whoever tests the start itself, brings packages of its own or kills processes calls the
interpreter.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
PATIENCE = 300  # seconds for the start
shared: list[str] = []  # the door of the process that waits for all, where there is one


@cache
def door() -> str:
    """Start the process that waits; it ends with this one. Where it is asked, from now or a little later on."""
    folder = TemporaryDirectory(prefix="vtp-warm-")
    path = str(Path(folder.name) / "door")
    command = [sys.executable, __file__, "serve", path]
    server = subprocess.Popen(command, env=os.environ | OFFLINE, stdin=subprocess.PIPE)

    def end() -> None:
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return path


@cache
def python() -> list[str]:
    """The command in front of `-m lmms_eval`."""
    path = Path(shared[0] if shared else door())
    until = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"lmms-eval was not imported within {PATIENCE} s: see the process behind {path}")
        time.sleep(0.05)
    return [sys.executable, "-S", "-E", __file__, str(path)]


def ask(door: str, arguments: list[str]) -> int:
    """The client: what the forked process ended with; if this one is killed, that one is."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(door)
        said = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(line, [len(said).to_bytes(8, "big")], [1, 2])
        line.sendall(said)
        return int.from_bytes(line.recv(1) or b"\1", "big")


def serve(door: str) -> None:
    """Fork for every client, until the process that started this one closes its input or is gone."""
    import_module("lmms_eval.__main__")
    import_module("lmms_eval.tasks").TaskManager()
    import_module("transformers.models.gemma3n.configuration_gemma3n")  # timm, for whoever asks what can be loaded
    gc.freeze()  # a run collects garbage twice: its own, not that of the imported packages
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{door}.new")
        listener.listen()
        os.rename(f"{door}.new", door)
        signal.signal(signal.SIGCHLD, reap)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            line, _ = listener.accept()
            with line:
                if not os.fork():
                    return keep(line)


def reap(*_: object) -> None:
    """What has ended, and what it used, is noted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def keep(line: socket.socket) -> None:
    """Fork the one that runs, tell how it ended, and end with it; end it if the client is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, *_ = socket.recv_fds(line, 8, 2)
    said, size = b"", int.from_bytes(head, "big")
    while len(said) < size:
        said += line.recv(size - len(said))
    if not (runner := os.fork()):
        line.close()
        return run(streams, **json.loads(said))
    while not (done := os.waitpid(runner, os.WNOHANG))[0]:
        if select.select([line], [], [], 0.05)[0]:
            os.kill(runner, signal.SIGKILL)
    line.sendall(bytes([os.waitstatus_to_exitcode(done[1]) & 255]))
    os._exit(0)


def run(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """What `python ARGUMENTS` does in this folder; arguments begin with `-m MODULE`."""
    os.setsid()
    for stream, own in zip((os.open(os.devnull, os.O_RDONLY), *streams), (0, 1, 2), strict=True):
        os.dup2(stream, own)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if data := environment.get("HF_DATASETS_CACHE"):  # read when the package was imported
        import_module("datasets").config.HF_DATASETS_CACHE = Path(data)
    sys.path[0], sys.argv[1:] = folder, arguments[2:]
    sys.stdout.reconfigure(line_buffering=True)
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
