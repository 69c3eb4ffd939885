"""The embedded model: both layouts are the same model, it answers, and it appears in the cache whole or not at all."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from matrix import FULL
from PIL import Image

import vtp_plugin
from vtp_plugin.errors import PruningError
from vtp_plugin.tiny import checkpoint
from vtp_plugin.tiny.checkpoint import NAME, WRITERS, resolve
from vtp_plugin.tiny.modeling import LLAMA_LAYERS
from vtp_plugin.tiny.store import WEIGHTS, load_weights, read, write

pytestmark = pytest.mark.long

datasets = pytest.importorskip("datasets")
TASKS = Path(vtp_plugin.__file__).parent / "hosts" / "lmms_eval" / "tasks" / "vtp_scenes"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VTP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rows():
    return datasets.Dataset.from_parquet(str(TASKS / "scenes.parquet")).cast_column(
        "image", datasets.Image(decode=False)
    )


@pytest.fixture(scope="module")
def hf(cache):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = resolve(layout="hf")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def picture(row) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


def prompt(question: str) -> str:
    return f"USER: <image>\n{question} ASSISTANT:"


def predict(hf, rows, task: str, system: str = "") -> list[str]:
    """The word that follows each prompt of a task."""
    model, processor = hf
    words = []
    for start in range(0, len(rows), 50):
        part = [rows[index] for index in range(start, min(start + 50, len(rows)))]
        texts = [system + prompt(row[f"{task}_question"]) for row in part]
        inputs = processor(images=list(map(picture, part)), text=texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs, logits_to_keep=1).logits  # [B, 1, V]
        words += processor.batch_decode(logits.argmax(-1))
    return words


def accuracy(hf, rows, task: str, system: str = "") -> float:
    pairs = zip(predict(hf, rows, task, system), rows[f"{task}_answer"], strict=True)
    return sum(word.strip() == answer for word, answer in pairs) / len(rows)


def test_the_model_answers(hf, rows):
    some = rows.select(range(300 if FULL else 50))
    scores = {task: accuracy(hf, some, task) for task in ("presence", "attribute", "count", "position", "digit")}
    assert sum(scores.values()) / len(scores) >= 0.90, scores
    assert scores["presence"] >= 0.95, scores


def test_the_language_model_has_eight_layers(hf):
    assert hf[0].config.text_config.num_hidden_layers == LLAMA_LAYERS == 8


def test_the_model_answers_after_a_system_prompt(hf, rows):
    assert accuracy(hf, rows.select(range(100)), "presence", SYSTEM) >= 0.90


def test_generation_ends_after_the_answer(hf, rows):
    model, processor = hf
    inputs = processor(images=picture(rows[0]), text=prompt(rows[0]["digit_question"]), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert len(ids) == 2
    assert ids[-1] == model.generation_config.eos_token_id


def test_both_layouts_are_the_same_model(hf, rows):
    pytest.importorskip("llava")
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    model, processor = hf
    folder = resolve(layout="llava")
    _, other, image_processor, _ = load_pretrained_model(str(folder), None, folder.name, device="cpu")
    inputs = processor(images=picture(rows[0]), text=prompt("is there a circle"), return_tensors="pt")
    pixels = process_images([picture(rows[0])], image_processor, other.config)
    assert torch.equal(pixels, inputs.pixel_values)
    ids = inputs.input_ids[0]
    image = ids == model.config.image_token_id
    first, count = int(image.nonzero()[0]), int(image.sum())
    ids = torch.cat([ids[:first], torch.tensor([-200]), ids[first + count :]])[None]
    with torch.inference_mode():
        ours = model(**inputs).logits
        theirs = other.float()(input_ids=ids, images=pixels.float()).logits
    assert count == 144
    torch.testing.assert_close(theirs, ours[..., : theirs.shape[-1]], atol=1e-3, rtol=1e-3)


def test_the_tower_is_a_whole_clip(cache, rows):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTextModelWithProjection

    folder = resolve(layout="clip")
    clip, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(["a red circle", "Why is that zebra so naïve?"], padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(folder)(picture(rows[0]), return_tensors="pt").pixel_values
    with torch.inference_mode():
        scores = clip(**texts, pixel_values=pixels)
        alone = CLIPTextModelWithProjection.from_pretrained(folder)(**texts).text_embeds
    assert tokenizer.unk_token_id not in texts.input_ids[1, 1:10]
    assert tokenizer.model_max_length == 77
    torch.testing.assert_close(torch.nn.functional.normalize(alone, dim=-1), scores.text_embeds)


def test_resolve_twice_is_one_folder(cache):
    first = resolve(layout="clip")
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(layout="clip") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_concurrent_processes_agree(tmp_path):
    said = "from vtp_plugin.tiny.checkpoint import resolve\nprint(resolve(layout='llava'))"
    (tmp_path / "resolving.py").write_text(said)
    command, environment = [*warm.python(), "-m", "resolving"], os.environ | {"VTP_CACHE": str(tmp_path / "cache")}
    given = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **given) for _ in range(2)]
    found = {process.communicate(timeout=300)[0].splitlines()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(found) == 1
    folder = Path(found.pop())
    assert "llava" in folder.name
    assert (folder / "model.safetensors").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(
        WRITERS[NAME, layout][0] for layout in ("clip", "llava")
    )


@pytest.mark.parametrize("wrong", [{"name": "vtp-huge"}, {"layout": "gguf"}])
def test_resolve_says_what_exists(wrong):
    with pytest.raises(ValueError, match="Available: "):
        resolve(**wrong)


def test_weights_are_stored_without_loss(tmp_path):
    state = load_weights("clip", "projector", prefixed=True)
    state |= {"odd": torch.tensor([float("inf"), -0.0, 6e-8, 65504]).half(), "one": torch.tensor(0.1).half()}
    write(tmp_path / "some.safetensors", state)
    found = read(tmp_path / "some.safetensors")
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name].flatten().view(torch.int16), value.flatten().view(torch.int16))
    assert (tmp_path / "some.safetensors").stat().st_size < 0.9 * sum(2 * value.numel() for value in state.values())


def test_the_package_stays_small():
    weights = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file())
    assert weights <= 20e6
    assert weights + sum(file.stat().st_size for file in TASKS.rglob("*") if file.is_file()) <= 25e6


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing", "without digest"])
def test_a_damaged_cache_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    folder = checkpoint.resolve(layout="clip")
    file = folder / ("digest.json" if damage == "without digest" else "model.safetensors")
    content = file.read_bytes()
    changed = {"changed": content[:-1] + bytes([content[-1] ^ 1]), "cut short": content[:99]}
    file.unlink()
    if damage in changed:
        file.write_bytes(changed[damage])
    assert checkpoint.resolve(layout="clip") == folder
    assert file.read_bytes() == content
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_tower_is_noticed_through_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    tower = checkpoint.resolve(layout="clip") / "config.json"
    checkpoint.resolve(layout="llava")
    tower.write_text("{}")
    checkpoint.resolve(layout="llava")
    assert "vision_config" in tower.read_text()


def test_what_a_host_leaves_beside_the_files_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    beside = checkpoint.resolve(layout="clip") / "host.txt"
    beside.write_text("mine")
    assert (checkpoint.resolve(layout="clip") / "host.txt").read_text() == "mine"


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PruningError) as error:
        checkpoint.resolve()
    assert "\n" not in str(error.value)
    assert f"cache folder '{tmp_path / 'file' / 'cache'}'" in str(error.value)
    assert "VTP_CACHE" in str(error.value)
