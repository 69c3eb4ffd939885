"""The embedded models on disk: weights in the package, laid out in a cache folder the way each host wants them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vtp_plugin.errors import PruningError, unknown

from .folders import TOWER, write_clip, write_hf, write_json, write_llava
from .store import CLIP_FACTORS, FILES, QWEN_WEIGHTS, WEIGHTS

Layout = Literal["llava", "hf", "clip"]
NAME, VIDEO_NAME, QWEN_NAME = "vtp-tiny", "vtp-tiny-video", "vtp-tiny-qwen"
NAMES = (NAME, VIDEO_NAME, QWEN_NAME)
CODE = ("checkpoint.py", "folders.py", "clips/folder.py", "qwen/folder.py")
LEARNED = {VIDEO_NAME: (CLIP_FACTORS, "clips.train"), QWEN_NAME: (QWEN_WEIGHTS, "qwen.train")}  # beside vtp-tiny's
DIGEST = "digest.json"  # beside the files: name -> hash, so that a damaged cache is noticed


def refuse_alike(name: str) -> None:
    """PruningError for `vtp-tny`, which a hub would be asked for."""
    if name.startswith("vtp-") and name not in NAMES and not Path(name).exists():
        raise unknown("embedded model", name, NAMES)


def resolve(name: str = NAME, layout: Layout = "llava") -> Path:
    """The folder of an embedded model in a layout, written on first use.

    `llava`: the authors' format. `hf`: transformers' LlavaForConditionalGeneration and LlavaProcessor, of
    `vtp-tiny-video` LlavaNextVideoForConditionalGeneration, of `vtp-tiny-qwen` Qwen2VLForConditionalGeneration, with
    their processors. `clip`: the CLIP with both towers, both projections, image processor and tokenizer. The folder
    appears whole or not at all, and is made again if a file of it is damaged (DIGEST). ValueError for an unknown name
    or layout, PruningError if the cache cannot be written or the model is not trained yet.
    """
    if name not in NAMES:
        raise ValueError(f"unknown embedded model {name!r}. Available: {', '.join(NAMES)}")
    offered = [known for model, known in WRITERS if model == name]
    if layout not in offered:
        raise ValueError(f"unknown layout {layout!r} of {name}. Available: {', '.join(offered)}")
    if name in LEARNED and not (WEIGHTS / LEARNED[name][0]).exists():
        raise PruningError(
            f"{name} is not trained yet: python -m vtp_plugin.tiny.{LEARNED[name][1]} --out DIR trains it"
        )
    if name == NAME and layout != "clip":
        resolve(name, "clip")  # both others name it as their tower
    try:
        place, write = WRITERS[name, layout]
        folder = cache_folder() / place
        if not whole(folder):
            appear(folder, write)
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or error
        raise PruningError(
            f"the embedded model cannot be written into the cache folder '{_root()}' ({said}); "
            "VTP_CACHE names another one"
        ) from None
    return folder


def cache_folder() -> Path:
    """One folder per weights, layout code and place, because the authors' format stores an absolute path."""
    root = _root().expanduser().resolve()
    return root / hashlib.sha256(f"{root}{fingerprint()}".encode()).hexdigest()[:12]


def _root() -> Path:
    if chosen := os.environ.get("VTP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vtp_plugin"


def whole(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        return json.loads((folder / DIGEST).read_text()) == digests(folder)
    except (OSError, ValueError):
        return False


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file that was written; what a host put beside them later does not count."""
    written = folder / DIGEST
    names = json.loads(written.read_text()) if written.exists() else sorted(path.name for path in folder.iterdir())
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """A hash of everything that a written folder depends on."""
    digest = hashlib.sha256()
    code = (Path(__file__).parent / name for name in CODE)
    stored = (WEIGHTS / name for name in (*FILES, CLIP_FACTORS, QWEN_WEIGHTS))
    for file in (*code, *filter(Path.exists, stored)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def appear(folder: Path, write: Callable[[Path], None]) -> None:
    """Write aside, then rename; of several processes the first one wins and the others agree."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(aside)
        write_json(aside / DIGEST, digests(aside))
        aside.chmod(0o755)
        if folder.exists() and not whole(folder):
            folder.rename(aside.with_name(f"{aside.name}.damaged"))
        aside.rename(folder)
    except OSError:
        if not whole(folder):
            raise
    finally:
        for left in (aside, aside.with_name(f"{aside.name}.damaged")):
            shutil.rmtree(left, ignore_errors=True)


def write_video(folder: Path) -> None:
    from .clips.folder import write_video as write  # with transformers and more, which the others need when they write

    write(folder)


def write_qwen(folder: Path) -> None:
    from .qwen.folder import write_qwen as write

    write(folder)


WRITERS: dict[tuple[str, str], tuple[str, Callable[[Path], None]]] = {  # model and layout: folder, and what fills it
    (NAME, "llava"): ("llava-vtp-tiny", write_llava),
    (NAME, "hf"): ("llava-vtp-tiny-hf", write_hf),
    (NAME, "clip"): (TOWER, write_clip),
    (VIDEO_NAME, "hf"): ("llava-next-vtp-tiny-video-hf", write_video),
    (QWEN_NAME, "hf"): ("qwen2-vl-vtp-tiny-hf", write_qwen),
}
