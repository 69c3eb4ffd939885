"""Runs of the unmodified host: its command line, what it wrote, and small local data for its own tasks."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
import warm
import yaml
from paths import TESTS
from PIL import Image
from warm import OFFLINE

from vtp_plugin.hosts.lmms_eval.plugin import TASKS
from vtp_plugin.strategies.vprune import VPrune
from vtp_plugin.surgery.pixels import patches
from vtp_plugin.tokens import VisualTokens

SCENES = "vtp_scenes_presence"
SIZES = ((168, 168), (300, 200), (90, 240), (64, 48))  # width, height
OWN_TASKS = TESTS / "hosts" / "lmms_eval" / "tasks"
TINY = "pretrained=vtp-tiny"
LOOSE = {"chi2_threshold": 30, "cosine_threshold": 0.9}  # V-PRUNE removes something from nearly every scene
VPRUNE = "pruning=vprune," + ",".join(f"pruning.{key}={value}" for key, value in LOOSE.items())
SETTINGS = [("llava", 1), ("llava", 4), ("llava_hf", 1)]
PATCH, GRID = 14, 12
PICTURES = (((48, 48),), ((60, 40), (40, 60)), ((80, 32),), ())  # sizes of the pictures of every document
CLIPS = (((64, 64), 4), ((64, 32), 8))  # size and frames of every video; decord pads widths to 64


def call(command: Sequence[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder, offline; its data caches stay in that folder."""
    variables = _variables(cwd) | environment
    return subprocess.run([*command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=900, check=False)


def call_together(cwd: Path, arguments: Sequence[str], ranks: int, **environment: str) -> list[tuple[int, str]]:
    """The waiting host so many times beside each other, told what torchrun tells its processes; how each ended, and
    what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    running = []
    for rank in map(str, range(ranks)):
        variables = _variables(cwd) | environment | told | {"RANK": rank, "LOCAL_RANK": rank}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [*warm.python(), "-m", "lmms_eval", *arguments]
        running.append(subprocess.Popen(command, cwd=cwd, env=variables, **streams))
    said = [process.communicate(timeout=900)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def _variables(cwd: Path) -> dict[str, str]:
    return os.environ | OFFLINE | {"HF_DATASETS_CACHE": str(cwd / "cache")}


def call_runs(
    cwd: Path, runs: Sequence[Mapping[str, Any]], command: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Several evaluations in one process, from a `--config` file; of the host that waits unless `command` says it."""
    (cwd / "runs.yaml").write_text(yaml.safe_dump(list(runs)))
    return call([*(command or (*warm.python(), "-m", "lmms_eval")), "--config", "runs.yaml"], cwd, **environment)


def results(folder: Path) -> list[dict[str, Any]]:
    """The results files under a folder, oldest first; file names are times."""
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("*_results.json"), key=lambda f: f.name)]


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """The lines of a task's sample files under a folder, in the order of the documents."""
    files = folder.rglob(f"*_samples_{task}.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["doc_id"])


def evaluate(model: Any, arguments: str, tasks: str = SCENES, limit: int = 4, **options: Any) -> dict[str, Any]:
    """`simple_evaluate` in this process, on one thread: the model is too small for two."""
    from lmms_eval.evaluator import simple_evaluate

    given = {"model": model, "model_args": arguments, "tasks": tasks.split(","), "limit": limit, "batch_size": 1}
    own = all(task.startswith("vtp_") for task in given["tasks"])
    given["task_manager"] = options.get("task_manager") or task_manager(model if isinstance(model, str) else "", own)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return simple_evaluate(**given | options)
    finally:
        torch.set_num_threads(threads)


@cache
def task_manager(model: str = "", own: bool = False, include: str | None = None) -> Any:
    """The host's catalogue of tasks, whose making takes seconds, or what is ours in it and below `include`.

    Prompts depend on the model's name.
    """
    from lmms_eval.tasks import TaskManager

    return TaskManager(model_name=model, include_path=include, include_defaults=not own)


# -- local data in the schema of the host's tasks ---------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (168, 168), flat: bool = True) -> Image.Image:
    """Noise, its upper half of one colour unless told otherwise."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if flat:
        pixels[: size[1] // 2] = draw.integers(0, 256, 3)
    return Image.fromarray(pixels)


def lines(results: dict[str, Any], task: str = SCENES) -> list[dict[str, Any]]:
    return sorted(results["samples"][task], key=lambda line: line["doc_id"])


def answers(results: dict[str, Any]) -> list[str]:
    return [line["resps"][0][0] for line in lines(results)]


def kept_by_vprune(document: int) -> int:
    """How many patches of a scene V-PRUNE keeps; scenes have the model's own size, so nothing is resized."""
    cell = parquet.read_table(TASKS / "vtp_scenes" / "scenes.parquet", columns=["image"])["image"][document]
    pixels = np.array(Image.open(io.BytesIO(cell.as_py()["bytes"])).convert("RGB"))
    tiles = patches(torch.from_numpy(pixels).permute(2, 0, 1)[None], PATCH)
    index = torch.arange(GRID * GRID)[None]
    visual = VisualTokens(tokens=torch.zeros(1, GRID * GRID, 1), grid=(GRID, GRID), index=index, pixels=tiles)
    return VPrune(**LOOSE).select(visual).counts[0]


def write_tasks(cwd: Path, flat: bool = True) -> None:
    """Data for pope, gqa, ai2d, scienceqa_img and textvqa_val where these tasks look for it: below the folder.

    One document for every size; science questions have as many without a picture behind them, with longer prompts.
    """
    pictures = [picture(seed, size, flat) for seed, size in enumerate(SIZES)]
    asked = [{"question_id": str(i), "question": f"Is there a w{i} here?", "image": p} for i, p in enumerate(pictures)]
    choices = ["one", "two", "three"]
    pope = [doc | {"id": doc["question_id"], "answer": "no", "category": "random"} for doc in asked]
    gqa = [{"id": d["question_id"], "imageId": f"n{i}", "question": d["question"]} for i, d in enumerate(asked)]
    ai2d = [{"question": d["question"], "image": d["image"], "options": choices, "answer": "1"} for d in asked]
    science = [d | {"choices": choices, "answer": 1, "hint": ""} for d in asked]
    science += [doc | {"image": None, "hint": "Two is a number, " * 9} for doc in science]
    textvqa = [d | {"question_id": i, "answers": ["two"] * 10, "ocr_tokens": []} for i, d in enumerate(asked)]
    _write(cwd, "POPE", {"default": ("test", pope)})
    instructions = "testdev", [doc | {"answer": "yes", "fullAnswer": "Yes."} for doc in gqa]
    images = "testdev", [{"id": f"n{i}", "image": p} for i, p in enumerate(pictures)]
    _write(cwd, "GQA", {"testdev_balanced_instructions": instructions, "testdev_balanced_images": images})
    _write(cwd, "ai2d", {"default": ("test", ai2d)})
    _write(cwd, "ScienceQA", {"ScienceQA-IMG": ("test", science)})
    _write(cwd, "textvqa", {"default": ("validation", textvqa)})


def write_own_tasks(folder: Path) -> None:
    """The tasks `pictures` and `clips` with their data."""
    shutil.copytree(OWN_TASKS, folder, dirs_exist_ok=True)
    _write_rows(folder / "pictures.parquet", "pictures", shown_pictures())
    names = [f"clip{number}.mp4" for number in range(len(CLIPS))]
    for seed, (name, (size, frames)) in enumerate(zip(names, CLIPS, strict=True)):
        _write_clip(folder / name, [picture(seed + n, size) for n in range(frames)])
    _write_rows(folder / "clips.parquet", "video", names)


def shown_pictures() -> list[list[Image.Image]]:
    """The pictures of every document of `pictures`."""
    return [[picture(10 * i + n, size) for n, size in enumerate(sizes)] for i, sizes in enumerate(PICTURES)]


def _write_rows(path: Path, name: str, shown: Sequence[Any]) -> None:
    """Documents with questions of unequal length; `name` is the column of what is shown."""
    from datasets import Dataset
    from datasets import Image as Picture

    questions = [{"question": f"Is it a {'very ' * i}red one?", "answer": "no"} for i in range(len(shown))]
    rows = Dataset.from_list([doc | {name: what} for doc, what in zip(questions, shown, strict=True)])
    (rows.cast_column(name, [Picture()]) if name == "pictures" else rows).to_parquet(path)


def _write_clip(path: Path, frames: Sequence[Image.Image]) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=2)
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, "yuv420p"
        for packet in [p for f in frames for p in stream.encode(av.VideoFrame.from_image(f))] + stream.encode():
            file.mux(packet)


def _write(cwd: Path, name: str, configs: Mapping[str, tuple[str, list[dict[str, Any]]]]) -> None:
    """One data set: a README that lists its configurations, and a parquet file for each."""
    from datasets import Dataset
    from datasets import Image as Picture

    folder = cwd / "lmms-lab-encoder" / name
    folder.mkdir(parents=True)
    entries = []
    for config, (split, rows) in configs.items():
        data = Dataset.from_list(rows)
        data = data.cast_column("image", Picture()) if "image" in rows[0] else data
        data.to_parquet(folder / f"{config}.parquet")
        entries.append({"config_name": config, "data_files": [{"split": split, "path": f"{config}.parquet"}]})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': entries})}---\n")
