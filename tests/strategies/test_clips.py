"""Clips of a file, read by whatever library is installed, through real processors: what moves is what EVS keeps.

The clip is written by the test: eight pictures of one background, in which a square moves from the left to the right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from families import FAMILIES
from family_runs import model_of

import vtp_plugin as vtp

SIDE, SQUARE, FRAMES, STEP = 64, 16, 8, 8  # pixels; a unit of a tiny Qwen-VL is 8 x 8 of them
TOP = 24
WHOLE = {"shortest_edge": SIDE**2, "longest_edge": 64 * SIDE**2}  # nothing is resized
PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": partial(checkpoints.qwen, "Qwen2_5_VL"),
    "qwen3_vl": partial(checkpoints.qwen, "Qwen3VL"),
    "llava_onevision": checkpoints._onevision,
}


def left_of(frame: int) -> int:
    """Where the square begins; it stays where it is for two frames, which towers of the Qwen family take together."""
    return STEP * (frame // 2)


def drawn() -> np.ndarray:
    """[FRAMES, SIDE, SIDE, 3] uint8"""
    coarse = np.random.default_rng(0).integers(60, 140, (8, 8, 3), dtype=np.uint8)
    clip = np.stack([coarse.repeat(8, 0).repeat(8, 1)] * FRAMES)
    for number, picture in enumerate(clip):
        picture[TOP : TOP + SQUARE, left_of(number) : left_of(number) + SQUARE] = (250, 20, 20)
    return clip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clips") / "square.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIDE, SIDE, "yuv420p", 4_000_000
        pictures = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in drawn()]
        for packet in [p for picture in pictures for p in stream.encode(picture)] + stream.encode():
            container.mux(packet)
    return path


def by_decord(path: Path) -> np.ndarray:
    decord = pytest.importorskip("decord")
    return decord.VideoReader(str(path)).get_batch(range(FRAMES)).asnumpy()


def by_pyav(path: Path) -> np.ndarray:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def by_torchcodec(path: Path) -> np.ndarray:
    decoders = pytest.importorskip("torchcodec.decoders")
    return decoders.VideoDecoder(str(path)).get_frames_in_range(0, FRAMES).data.permute(0, 2, 3, 1).numpy()


READERS = [by_decord, by_pyav, by_torchcodec]


@pytest.mark.parametrize("reader", READERS)
def test_the_clip_is_what_was_drawn(reader: Callable[[Path], np.ndarray], file: Path) -> None:
    read = reader(file)
    assert read.shape == drawn().shape
    assert np.abs(read.astype(int) - drawn()).mean() < 12  # the codec is lossy


def kept(name: str, clip: np.ndarray, strategy: str, **fields: Any) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Frame, row and column of what is left [K, 3], and the film."""
    processor, model = PROCESSORS[name](), model_of(name, "sdpa")
    sizes = {"size": WHOLE, "do_sample_frames": False} if name.startswith("qwen") else {}
    shown = processor.video_processor(videos=[torch.from_numpy(clip).permute(0, 3, 1, 2)], return_tensors="pt", **sizes)
    family = FAMILIES[name]
    film = (FRAMES, 2, 2)
    if "video_grid_thw" in shown:
        frames, rows, columns = shown["video_grid_thw"][0].tolist()
        film = (frames, rows // 2, columns // 2)
    total = film[0] * film[1] * film[2] + ("video_grid_thw" not in shown)  # a newline
    prompt = family.video(3)
    video = [token for token in prompt.ids if token == checkpoints.VIDEO]
    first = prompt.ids.index(checkpoints.VIDEO)
    words = [token for token in prompt.ids if token != checkpoints.VIDEO]
    prompt.ids = words[:first] + video[:1] * total + words[first:]
    if name == "qwen3_vl":  # a time stamp between frames
        prompt.ids = words[:first] + [*video[:1] * (total // film[0]), 7] * film[0] + words[first:]
    names = ("pixel_values_videos", "video_grid_thw")
    prompt.images = {n: shown[n] for n in names if n in shown}
    with torch.no_grad(), vtp.prune(model, strategy, processor=processor, **fields) as pruned:
        model(**family.batch([prompt]))
    (index,) = pruned.events[0].kept
    places = film[1] * film[2]
    return torch.stack([index // places, index % places // film[2], index % film[2]], dim=1), film


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name.startswith("qwen")])
def test_what_moves_is_kept(name: str, file: Path) -> None:
    """Behind the first frame: the units of 8 x 8 pixels that the square comes to, and those that it leaves."""
    news = [[frame, row, column] for frame in (1, 2, 3) for row in (3, 4) for column in (frame - 1, frame + 1)]
    found, film = kept(name, by_pyav(file), "evs", keep_tokens=64 + len(news))
    assert film == (4, 8, 8)
    assert found[:64, 0].eq(0).all()
    assert found[64:].tolist() == news


@pytest.mark.parametrize("strategy", ["evs", "vidcom2", "flashvid"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_reader_gives_the_same_tokens(name: str, strategy: str, file: Path) -> None:
    pytest.importorskip("decord")
    (first, film), (second, _) = (kept(name, read(file), strategy, keep_ratio=0.4) for read in (by_pyav, by_decord))
    total = film[0] * film[1] * film[2]
    assert len(first) == int(0.4 * total)
    if np.array_equal(by_pyav(file), by_decord(file)):
        assert torch.equal(first, second)
    assert len(first) == len(second)
