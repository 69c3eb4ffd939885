"""Methods for videos in whole models: which frame and place a token is of, and what is answered, by slow references."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, Processor, Prompt
from family_runs import batched, check_reference, decided, logits_of, model_of
from matrix import dear
from restated_flashvid import Restated
from torch import Tensor, nn

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens
from vtp_plugin.errors import PruningError
from vtp_plugin.promises import Case, reference
from vtp_plugin.promises.probe import parts_of, placeholders
from vtp_plugin.promises.reference import Dropped
from vtp_plugin.surgery.undo import Undo

FOUR = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")
FRAMES = ("minicpmv4_6", "minicpmv4_7")  # to which every frame is an image of its own
VIDEOS = dear([n for n, family in FAMILIES.items() if family.video is not None and n not in FRAMES], FOUR)
CUTTING = ("evs", "vidcom2")
FLASH = {"keep_tokens": 5, "segments": 1, "scene": -1.0, "join": 0.1}
METHODS = [(name, {"keep_tokens": k}) for name in CUTTING for k in (5, 9)] + [("flashvid", FLASH)]
SEEN: list[VisualTokens] = []


@dataclass(kw_only=True)
class Spy(PruningStrategy):
    """Keeps everything, and what it saw."""

    name, stage, paper, needs = "spy", Stage.PROJECTOR, "none", ("film", "frame", "cell", "cls_attention")
    budgeted = False

    def select(self, visual: VisualTokens) -> Selection:
        SEEN.append(visual)
        return Selection.everything(visual.index)


def spied(model: nn.Module, inputs: dict[str, Any]) -> list[VisualTokens]:
    SEEN.clear()
    with torch.no_grad(), vtp.prune(model, Spy()):
        model(**inputs)
    return list(SEEN)


# -- where a token is -------------------------------------------------------------------------------------------------


def patchwise(name: str) -> nn.Module:
    """A model whose tower has no attention: what comes out for a patch depends on this patch alone."""
    model = deepcopy(model_of(name, "sdpa"))
    for path, module in model.model.named_modules():
        if re.search(r"vis(ion|ual).*attn\.(out_)?proj$", path):
            nn.init.zeros_(module.weight)
    return model


def touched(name: str, values: Tensor, gradient: Tensor) -> set[tuple[int, int, int]]:
    """The frames, rows and columns of the patches, four pixels wide, that a gradient of pixel values touches."""
    if name.startswith(("qwen", "glm")):  # patches of three frames of 4 x 8, squares of 2 x 2 side by side
        at = (gradient != 0).any(-1).view(3, 2, 4, 2, 2).nonzero().tolist()
        return {(t, 2 * r + i, 2 * c + j) for t, r, c, i, j in at}
    at = (gradient != 0).any(2)[0].nonzero().tolist()  # [1, F, 3, H, W]
    return {(t, y // 4, x // 4) for t, y, x in at}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_token_is_of_the_frame_and_place_that_its_pixels_are_of(name: str) -> None:
    model, family = patchwise(name), FAMILIES[name]
    inputs = batched(family, (family.video(3),))
    (seen,) = spied(model, inputs)
    values = inputs["pixel_values_videos"].requires_grad_()
    arguments = {"pixel_values_videos": values} | {k: v for k, v in inputs.items() if k == "video_grid_thw"}
    rows = model.model.get_video_features(**arguments, return_dict=True).pooler_output
    rows = torch.cat([row.flatten(0, -2) for row in rows])
    frames, down, across = seen.film
    assert seen.tokens.shape[1] == frames * down * across
    assert frames == 3
    found = []
    for row in rows[: seen.tokens.shape[1]]:  # behind them: a newline
        (gradient,) = torch.autograd.grad(row.square().sum(), values, retain_graph=True)
        at = touched(name, values, gradient)
        (frame,) = {t for t, _, _ in at}
        middle = [sum(place[axis] for place in at) / len(at) for axis in (1, 2)]
        found.append((frame, round(middle[0] // 2), round(middle[1] // 2)))
    told = zip(seen.frame[0].tolist(), *seen.cell[0].unbind(-1), strict=True)
    assert found == [(frame, int(y), int(x)) for frame, y, x in told]


@pytest.mark.parametrize("name", VIDEOS)
def test_a_picture_is_one_frame(name: str) -> None:
    family = FAMILIES[name]
    for seen in spied(model_of(name, "sdpa"), batched(family, (family.sample(0, 2),))):
        frames, rows, columns = seen.film
        assert frames == 1
        assert not seen.frame.any()
        places = seen.cell[0, :, 0] * columns + seen.cell[0, :, 1]
        assert len(places.unique()) == seen.tokens.shape[1] <= rows * columns


def test_several_videos_have_no_frames_in_common() -> None:
    family, model = FAMILIES["qwen2_5_vl"], model_of("qwen2_5_vl", "sdpa")
    inputs = batched(family, (family.sample(0, 2),))
    said = "spy: frames are those of one video, budget=total is of several"
    with vtp.prune(model, Spy(budget="total")), pytest.raises(PruningError, match=said):
        model(**inputs)


# -- what is answered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("strategy", "fields"), METHODS[:-1])
@pytest.mark.parametrize("name", VIDEOS)
def test_answers_equal_the_slow_reference(name: str, strategy: str, fields: dict[str, Any], attention: str) -> None:
    family, model = FAMILIES[name], model_of(name, attention)
    fields = {**fields, "positions": "original"}
    check_reference(model, family, (family.video(3),), "projector", strategy, fields)


def both(name: str) -> Prompt:
    """A picture, then a video."""
    family = FAMILIES[name]
    picture, video = family.sample(0, 1), family.video(3)
    return Prompt(picture.ids + video.ids, picture.images | video.images, picture.totals + video.totals)


@pytest.mark.parametrize(("strategy", "fields"), METHODS[:-1])
@pytest.mark.parametrize("name", [name for name in VIDEOS if not name.startswith("glm")])
def test_a_picture_beside_a_video(name: str, strategy: str, fields: dict[str, Any]) -> None:
    """EVS leaves the picture whole, VidCom2 cuts it as a video of one frame."""
    family, model, prompts = FAMILIES[name], model_of(name, "sdpa"), (both(name),)
    check_reference(model, family, prompts, "projector", strategy, {**fields, "positions": "original"})
    _, events = decided(model, family, prompts, strategy, fields)  # one of pictures, one of videos
    (picture, video), (before, whole) = (
        [n for event in events for n in getattr(event, at)] for at in ("after", "before")
    )
    k, frame = fields["keep_tokens"], 8 if family.mrope else 4
    assert (picture, video) == ((before, max(frame, k)) if strategy == "evs" else (k, k))
    assert k < before
    assert video < whole


@pytest.mark.parametrize("name", VIDEOS)
def test_merged_answers_equal_the_slow_reference(name: str) -> None:
    """FlashVID's rows, restated from the host's, in the place of the host's; the columns of the others hidden."""
    family, model, prompt = FAMILIES[name], model_of(name, "eager"), FAMILIES[name].video(3)
    output, (event,) = decided(model, family, (prompt,), "flashvid", FLASH)
    inputs = batched(family, (prompt,))
    (seen,) = spied(model, inputs)
    columns, values = Restated(
        seen, 0, FLASH["keep_tokens"], {k: v for k, v in FLASH.items() if k != "keep_tokens"}
    ).answer()
    assert event.kept[0].tolist() == columns
    assert any(values[column] != pytest.approx(seen.tokens[0, column].tolist(), abs=1e-3) for column in columns)
    case = Case(model, [inputs], processor=Processor())
    (where,) = placeholders(case, inputs)
    judged = where[: seen.tokens.shape[1]]
    dropped = Dropped(columns=judged[~torch.isin(judged, judged[columns])], positions="original", later=family.later)
    host = model.model.get_video_features

    def merged(*args: Any, **kwargs: Any) -> Any:
        found = host(*args, **kwargs)
        rows = found.pooler_output[0].clone()
        for column, value in values.items():
            rows[column] = torch.tensor(value)
        found.pooler_output = (
            rows[None] if isinstance(found.pooler_output, Tensor) else type(found.pooler_output)([rows])
        )
        return found

    with Undo() as undo:
        undo.override(model.model, "get_video_features", merged)
        answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        slow = reference.logits(model, parts_of(case), inputs, dropped, answer)
    torch.testing.assert_close(torch.cat(output.logits), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("strategy", "fields"), METHODS)
@pytest.mark.parametrize("name", [name for name in VIDEOS if "vit" in FAMILIES[name].video_stages])
def test_behind_a_cut_in_the_tower(name: str, strategy: str, fields: dict[str, Any]) -> None:
    """Frames that lost tokens before: the budget holds, and the model is given back."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, (family.video(3),))
    before = logits_of(model, dict(inputs))
    fields = {f"{strategy}.{key}": value for key, value in fields.items()}
    with vtp.prune(model, f"l2+{strategy}", processor=Processor(), **{"l2.keep_ratio": 0.7}, **fields) as pruned:
        logits_of(model, dict(inputs))
        first, second = pruned.events
    assert second.before == first.after == [16]
    assert second.after == [
        max(8, fields[f"{strategy}.keep_tokens"]) if strategy == "evs" else fields[f"{strategy}.keep_tokens"]
    ]
    assert torch.isin(second.kept[0], first.kept[0]).all()
    assert torch.equal(logits_of(model, inputs), before)


@pytest.mark.parametrize("strategy", [*CUTTING, "flashvid"])
@pytest.mark.parametrize("name", ["internvl", "gemma3", "llava_siglip"])
def test_a_family_that_is_shown_pictures_only_refuses(name: str, strategy: str) -> None:
    said = rf"^{strategy}: it compares the frames of a video, .* is shown pictures only; possible here: "
    with pytest.raises(PruningError, match=said):
        vtp.prune(model_of(name, "sdpa"), strategy, processor=Processor())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_what_goes_into_the_merger_may_be_compared(name: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    kept = []
    for judge in ("after", "before"):
        _, (event,) = decided(model, family, (family.video(3),), "vidcom2", {"keep_tokens": 9, "judge": judge})
        kept.append(event.kept[0].tolist())
    assert kept[0] != kept[1]
    assert len(kept[0]) == len(kept[1]) == 9


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_flashvid_in_two_stages(name: str) -> None:
    """What enters the language model, and what is left of it in front of a later layer."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    stages = {"flashvid.keep_ratio": 0.5, "fastv.layer": 2, "fastv.keep_ratio": 0.3}
    with vtp.prune(model, "flashvid+fastv", processor=Processor(), **stages) as pruned:
        logits_of(model, batched(family, (family.video(3),)))
    total = 24 if family.mrope else 12
    assert pruned.events[0].after[0] == total // 2
    assert pruned.events[1].after[0] == round(0.3 * pruned.events[1].before[0])


@pytest.mark.parametrize("name", [name for name in FRAMES if name in FAMILIES])
def test_frames_that_are_images_are_not_compared(name: str) -> None:
    with pytest.raises(
        PruningError, match=r"^evs: it compares the frames of a video, MiniCPM-V 4.\d is shown pictures"
    ):
        vtp.prune(model_of(name, "sdpa"), "evs")
