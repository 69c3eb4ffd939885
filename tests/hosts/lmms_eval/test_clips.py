"""The clips under the real host: methods for videos prune the embedded video model, with frames and with files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lmms
import numpy as np
import pytest

pytest.importorskip("lmms_eval")

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.plugin import TASKS, documents
from vtp_plugin.tiny.clips.testset import CLIPS, PARQUET, read

VIDEO = "pretrained=vtp-tiny-video,device=cpu"
TOKENS = 288


@pytest.fixture(scope="module")
def utils() -> Any:
    """The tasks' own functions, as the host loads them."""
    spec = importlib.util.spec_from_file_location("vtp_clips_utils", TASKS / "vtp_clips" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def document() -> dict[str, Any]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(PARQUET).slice(3, 1).to_pylist()[0] | {"question": "what came"}


@pytest.mark.parametrize("method", ["evs", "vidcom2", "flashvid"])
def test_methods_for_videos_divide_one_budget(method: str) -> None:
    arguments = f"{VIDEO},pruning={method},pruning.keep_ratio=0.25"
    results = lmms.evaluate("huggingface", arguments, "vtp_clips", limit=2)
    assert results["pruning"]["model"]["family"] == "llava_next_video"
    assert results["pruning"]["samples"] == {"total": 4, "with_images": 4, "pruned": 4}
    for task in ("which", "moves"):
        for line in lmms.lines(results, f"vtp_clips_{task}"):
            assert line["pruning"]["images"] == [{"before": TOKENS, "after": TOKENS // 4}]


def test_every_task_has_its_questions() -> None:
    assert {documents(f"vtp_clips{way}_{task}") for way in ("", "_last") for task in ("which", "first")} == {CLIPS}


def test_another_model_class_is_refused() -> None:
    with pytest.raises(PruningError, match=r"unknown model for vtp-tiny-video 'llava_hf'.*huggingface"):
        lmms.evaluate("llava_hf", "pretrained=vtp-tiny-video,pruning=evs", "vtp_clips", limit=1)


def test_controls_show_other_frames(utils: Any) -> None:
    doc = document()
    frames = read(doc).frames()
    shown = {}
    for name in ("doc", "shuffled", "last"):
        ((video, text),) = [turn["content"] for turn in getattr(utils, f"{name}_to_messages")(doc)]
        assert text == {"type": "text", "text": "what came"}
        shown[name] = np.stack([np.asarray(frame) for frame in video["url"]])
    assert np.array_equal(shown["doc"], frames)
    assert np.array_equal(shown["last"], frames[[-1] * 8])
    assert sorted(f.tobytes() for f in shown["shuffled"]) == sorted(f.tobytes() for f in frames)
    assert not np.array_equal(shown["shuffled"], frames)


def test_hosts_that_open_files_get_the_same_clip(utils: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decord = pytest.importorskip("decord")
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    doc = document()
    (path,) = utils.doc_to_visual(doc)
    read_back = decord.VideoReader(path)[:].asnumpy()
    assert read_back.shape == read(doc).frames().shape
    assert np.abs(read_back.astype(float) - read(doc).frames()).mean() < 4
    written = Path(path).stat().st_mtime_ns
    assert utils.doc_to_visual(doc) == [path]
    assert Path(path).stat().st_mtime_ns == written
