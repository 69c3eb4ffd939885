"""A run over vLLM that fails or is killed leaves no process and no shared memory, and says so by its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from engines import LEAVES_MEMORY

pytest.importorskip("lmms_eval")
pytestmark = LEAVES_MEMORY

MARK = "VTP_TEST_RUN"  # in the environment of the run, which all its processes inherit
SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 300.0  # seconds until the run has come to a place
GRACE = 30.0  # seconds that its processes may take to end
PLACES = {  # a function of ours that runs there, in the process of lmms-eval
    "engine is up": "vtp_plugin.hosts.lmms_eval.served:Requests._watch",
    "questions are answered": "vtp_plugin.hosts.lmms_eval.served:Requests._sample",
    "answers are checked": "vtp_plugin.hosts.lmms_eval.evaluation:check",
}
PROGRAM = """
import pathlib, sys, time
from vtp_plugin.contract import located

place, here, wait = sys.argv[1:4]
sys.argv[1:] = sys.argv[4:]

def reached(*args, **kwargs):
    pathlib.Path(here).touch()
    if wait == "wait":
        time.sleep(600)
    raise ZeroDivisionError("the test stops it here")

if __name__ == "__main__":
    owner, _, name = place.rpartition("." if "." in place.partition(":")[2] else ":")
    setattr(located(owner if ":" in owner else owner + ":"), name, reached)
    from lmms_eval.cli.dispatch import main
    main()
"""


def wait_for(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def left(mark: str) -> list[str]:
    """The command lines of all processes of a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def abandoned() -> set[Path]:
    """Shared memory that no process has mapped; other tests may have some of their own at the same time."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # of a process that has ended
            mapped += maps.read_text()
    return {entry for entry in SHARED_MEMORY.iterdir() if str(entry) not in mapped}


@pytest.mark.parametrize(
    ("place", "how"),
    [
        *((place, None) for place in PLACES),
        ("questions are answered", "SIGTERM"),
        ("questions are answered", "SIGKILL"),
    ],
)
def test_nothing_stays(place: str, how: str | None, tmp_path: Path):
    mark, here, memory = uuid.uuid4().hex, tmp_path / "here", abandoned()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), PLACES[place], str(here), "wait" if how else "raise"]
    command += ["--model", "vllm", "--model_args", "model=vtp-tiny", "--tasks", "vtp_scenes_presence", "--limit", "2"]
    command += ["--pruning", "visionzip", "--pruning_args", "keep_ratio=0.25"]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, env={**environment, MARK: mark}, stdout=log, stderr=log, cwd=tmp_path)
        assert wait_for(lambda: here.exists() or run.poll() is not None, PATIENCE), "never got there"
        assert here.exists(), (tmp_path / "log").read_text()[-3000:]
        if how:
            assert len(left(mark)) > 1  # the engine has processes of its own
            run.send_signal(getattr(signal, how))
        assert run.wait(GRACE + 60) != 0
    assert wait_for(lambda: not left(mark), GRACE), left(mark)
    assert wait_for(lambda: abandoned() <= memory, GRACE), abandoned() - memory
    if how is None:
        assert "the test stops it here" in (tmp_path / "log").read_text()


SERVER = """
import pathlib, sys, time
from vtp_plugin.hosts.vllm.serving import serving
from vtp_plugin.tiny.checkpoint import resolve

folder = pathlib.Path(sys.argv[1])
options = ["--dtype", "float32", "--max-model-len", "640", "--enforce-eager"]
with serving(str(resolve("vtp-tiny", "hf")), {"strategy": "l2"}, options, folder / "server.log"):
    (folder / "here").touch()
    time.sleep(600)
"""


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path):
    mark, memory = uuid.uuid4().hex, abandoned()
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    run = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path)], env={**environment, MARK: mark})
    assert wait_for(lambda: (tmp_path / "here").exists() or run.poll() is not None, PATIENCE), "never got there"
    assert len(left(mark)) > 2
    run.kill()
    run.wait(GRACE)
    assert wait_for(lambda: not left(mark), GRACE), left(mark)
    assert wait_for(lambda: abandoned() <= memory, GRACE), abandoned() - memory
