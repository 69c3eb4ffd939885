"""The gallery of a run: what pruning did to the pictures of the first documents, small enough to keep for every run.

Written while an evaluation runs if `VTP_GALLERY` names a folder: `looks*.jsonl` with one line per document (one file
per process), and JPEGs of the pictures as the model saw them. A JPEG is named by its content and written once; with
`VTP_GALLERY_PICTURES` runs over the same pictures share one folder. `VTP_GALLERY_SAMPLES` (40): documents per task.
The layout is documented in docs/reporting.md; `SCHEMA` counts its versions.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vtp_plugin import files
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.observations import Observation, Observer

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned
    from vtp_plugin.surgery.call import Call

SCHEMA = 1
FOLDER, PICTURES, SAMPLES = "VTP_GALLERY", "VTP_GALLERY_PICTURES", "VTP_GALLERY_SAMPLES"
DEFAULT_SAMPLES = 40
SIDE, QUALITY = 336, 60  # of a stored picture: longest side in pixels, JPEG quality
LARGEST = 10**6  # patches of a picture
SHOWN = 4  # images of one document; of more than these, only the one that shows the whole picture
NAME, JPEG = re.compile(r"[\w-]+\.jpg"), b"\xff\xd8\xff"  # of a stored picture: how it is called, how it begins
UNJUDGED = 255  # a score of 0 ... 254 is quantised, this stands for none


@dataclass(frozen=True)
class Shown:
    """One image of a document, as it is read back."""

    picture: str  # file name, "" where the picture could not be recovered
    grid: tuple[int, int]
    total: int
    left: int
    kept: np.ndarray  # [rows, columns] bool
    scores: np.ndarray | None  # [rows, columns], 0 ... 1, nan where nothing was judged
    scored_by: str
    into: np.ndarray | None  # [rows, columns]: raster position that a token was merged into, -1: none
    view: str


@dataclass
class Gallery:
    """Documents by task and number, and where their pictures are."""

    documents: dict[tuple[str, int], list[Shown]] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)

    def picture(self, name: str) -> bytes | None:
        """The JPEG of that name, from inside one of the folders: a run may come from somebody else."""
        if not NAME.fullmatch(name):
            return None
        inside = (path for folder in self.folders if (path := (folder / name).resolve()).parent == folder.resolve())
        found = next((path.read_bytes() for path in inside if path.is_file()), None)
        return found if found and found.startswith(JPEG) else None


# -- writing ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Writes the gallery of one run."""

    def __init__(self, pruned: Pruned, folder: Path, pictures: Path, samples: int) -> None:
        self.folder, self.pictures, self.samples = folder, pictures, samples
        self.observer = Observer(pruned)
        self.overview = pruned.adapter.overview
        self.lines: dict[tuple[str, int], str] = {}

    @classmethod
    def wanted(cls, pruned: Pruned, environment: Mapping[str, str] = os.environ) -> Recorder | None:
        """A recorder if the environment asks for one."""
        if not environment.get(FOLDER):
            return None
        samples = environment.get(SAMPLES, str(DEFAULT_SAMPLES))
        if not samples.isdigit():
            raise PruningError(f"{SAMPLES} must be a whole number, got '{samples}'")
        folder = Path(environment[FOLDER])
        return cls(pruned, folder, Path(environment.get(PICTURES) or folder / "pictures"), int(samples))

    def add(self, call: Call, documents: Sequence[tuple[str, int]]) -> None:
        """One finished call, with the document behind every row of its batch; none if they are not known."""
        looks = self.observer.observe(call) if any(self._new(*document) for document in documents) else []
        for row, (task, number) in enumerate(documents):
            if self._new(task, number):
                own = [look for look, image in zip(looks, call.images, strict=True) if image.sample == row]
                images = [self._entry(look) for look in self._shown(own) if look is not None]
                line = {"schema": SCHEMA, "task": task, "doc_id": number, "images": images}
                self.lines[task, number] = json.dumps(line)

    def write(self) -> None:
        """Put the file of this process in place, whole."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        process = torch.distributed.get_rank() if distributed else 0
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(line + "\n" for _, line in sorted(self.lines.items()))
        _replace(self.folder / f"looks{f'.{process}' if process else ''}.jsonl", lines.encode())

    def _new(self, task: str, number: Any) -> bool:
        return isinstance(number, int) and number < self.samples and (task, number) not in self.lines

    def _shown(self, looks: Sequence[Observation | None]) -> Sequence[Observation | None]:
        return looks if len(looks) <= SHOWN else [looks[self.overview]]

    def _entry(self, look: Observation) -> dict[str, Any]:
        kept = np.zeros(look.grid[0] * look.grid[1], dtype=bool)
        kept[look.kept] = True
        entry = {"grid": look.grid, "total": look.total, "left": look.left, "kept": _coded(np.packbits(kept))}
        if look.pixels is not None:
            entry["picture"] = self._stored(jpeg(look.pixels))
        if look.scores is not None:
            entry |= {"scores": _coded(quantised(look.scores.numpy())), "scored_by": look.scored_by}
        if look.into:
            entry["into"] = _coded(np.array(look.into, dtype="<i4"))
        return entry | ({"view": look.view} if look.view else {})

    def _stored(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()[:16] + ".jpg"
        if not (self.pictures / name).is_file():
            self.pictures.mkdir(parents=True, exist_ok=True)
            _replace(self.pictures / name, data)
        return name


def jpeg(pixels: torch.Tensor) -> bytes:
    """A picture [3, H, W] uint8, made smaller where it is larger than SIDE."""
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def quantised(scores: np.ndarray) -> np.ndarray:
    """Scores as 0 (the lowest) ... 254 (the highest), UNJUDGED for nan."""
    there = ~np.isnan(scores)
    low, high = (scores[there].min(), scores[there].max()) if there.any() else (0.0, 0.0)
    levels = np.full(len(scores), UNJUDGED, dtype=np.uint8)
    levels[there] = np.round((scores[there] - low) / max(high - low, np.finfo(np.float32).tiny) * (UNJUDGED - 1))
    return levels


def _coded(values: np.ndarray) -> str:
    return b64encode(values.tobytes()).decode()


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


# -- reading ----------------------------------------------------------------------------------------------------------


def read(folder: Path, pictures: Path | None = None) -> Gallery:
    """What a run wrote into its gallery folder; empty if it wrote none. PruningError for a file that is cut short."""
    gallery = Gallery(folders=[path for path in (pictures, folder / "pictures") if path is not None])
    for path in (folder, *gallery.folders):
        if path.is_symlink():
            raise PruningError(f"{path}: a link; a report reads pictures from inside the run folder only")
    for path in sorted(folder.glob("looks*.jsonl")):
        for number, line in enumerate(files.read_text(path).splitlines(), 1):
            try:
                entry = json.loads(line)
                gallery.documents[entry["task"], entry["doc_id"]] = [_shown(image) for image in entry["images"]]
            except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
                raise PruningError(
                    f"{path}, line {number}: not a document of a gallery, written only in part?"
                ) from None
    return gallery


def _shown(entry: Mapping[str, Any]) -> Shown:
    rows, columns = entry["grid"]
    if not 0 < rows * columns <= LARGEST:
        raise ValueError("no grid")
    bits = np.unpackbits(np.frombuffer(b64decode(entry["kept"]), np.uint8), count=rows * columns)
    scores = None
    if "scores" in entry:
        levels = np.frombuffer(b64decode(entry["scores"]), np.uint8).reshape(rows, columns)
        scores = np.where(levels == UNJUDGED, np.nan, levels / (UNJUDGED - 1))
    into = np.frombuffer(b64decode(entry["into"]), "<i4").reshape(rows, columns) if "into" in entry else None
    return Shown(
        picture=str(entry.get("picture", "")),
        grid=(rows, columns),
        total=entry["total"],
        left=entry["left"],
        kept=bits.astype(bool).reshape(rows, columns),
        scores=scores,
        scored_by=entry.get("scored_by", ""),
        into=into,
        view=entry.get("view", ""),
    )
