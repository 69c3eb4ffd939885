"""The program `vtp` as a user types it, in this process and in one of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

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
