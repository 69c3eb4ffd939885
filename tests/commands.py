"""The program `vtp` as a user types it, in this process and in one of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from typer.testing import CliRunner

from vtp_plugin.cli import app, run, vtp_register_commands

vtp_register_commands(cli=app)


def vtp(*arguments: object) -> str:
    """Run a command in this process; its output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def ended(*arguments: object) -> subprocess.CompletedProcess:
    """Run a command line in this process, up to the exit code; what `main` ends the process with."""
    command, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def program(*arguments: object) -> subprocess.CompletedProcess:
    """Run the real program."""
    command = [sys.executable, "-c", "from vtp_plugin.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


HOLD = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"


@contextmanager
def at_work(kind: str, path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds a `folder` or a `file` for as long as this lasts."""
    lock = path / ".lock" if kind == "folder" else path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        yield other
        other.kill()
