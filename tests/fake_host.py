"""Stands in for the host in tests of the sweep: says and writes what lmms-eval with the plugin does, at once, and can
misbehave.

Started as `fake_host.py -m lmms_eval --config FILE`. FAKE_KILLED, FAKE_RAISES, FAKE_HALF: ids of cells that die, raise
or end with half of their log written; FAKE_SECONDS: how long a cell takes; FAKE_LOG: a file that notes every start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import runfolder
import yaml

QUESTIONS = 8


FREE = {"vprune": 0.75}  # what a strategy without a budget leaves


def answers(id: str, questions: int = QUESTIONS) -> list[str]:
    """Right but for every k-th, k by the name of the cell."""
    k = 2 + sum(map(ord, id)) % 5
    return ["no" if number % k == 1 else "yes" for number in range(questions)]


def evaluate(entry: dict) -> None:
    folder = Path(entry["output_path"])
    say(folder, "started")
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(folder.name + "\n")
    for done in range(QUESTIONS):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")) / QUESTIONS)
        say(folder, "answered", done=done + 1, of=QUESTIONS)
        if folder.name in os.environ.get("FAKE_KILLED", "").split(",") and done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    if folder.name in os.environ.get("FAKE_RAISES", "").split(","):
        raise ValueError("this cell\ncannot be run.")
    write(folder, entry)


def say(folder: Path, event: str, **facts: object) -> None:
    """As the plugin does inside the real host; the line on the output is what the sweep wakes up from."""
    with open(os.environ["VTP_STATUS"], "a") as status:
        status.write(json.dumps({"cell": str(folder), "event": event, **facts}) + "\n")
    print(event, end="\r", file=sys.stderr)


def write(folder: Path, entry: dict) -> None:
    """The results of the tasks that are asked for, every task with the same answers, and their logs."""
    after = int(144 * entry.get("pruning_args", {}).get("keep_ratio", FREE.get(entry.get("pruning"), 1)))
    given = answers(folder.name, entry.get("limit", QUESTIONS))
    lines = [runfolder.line(n, a, "yes", after) for n, a in enumerate(given)]
    (folder / "fake").mkdir(parents=True)
    tasks = entry["tasks"].split(",")
    content, *more = (runfolder.results(lines, after, task, entry["model"], "fake") for task in tasks)
    for other in more:
        for part in ("results", "configs", "n-samples"):
            content[part] |= other[part]
    (folder / "fake" / "20260101_000000_results.json").write_text(json.dumps(content))
    lines = lines[:3] if folder.name in os.environ.get("FAKE_HALF", "").split(",") else lines
    for task in tasks:
        log = folder / "fake" / f"20260101_000000_samples_{task}.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    assert sys.argv[1:3] + sys.argv[3:4] == ["-m", "lmms_eval", "--config"]
    for entry in yaml.safe_load(Path(sys.argv[4]).read_text()):
        try:
            evaluate(entry)
        except ValueError as error:
            say(Path(entry["output_path"]), "failed", error=str(error))


if __name__ == "__main__":
    main()
