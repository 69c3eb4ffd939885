"""judge=before: what goes into a merger is judged instead of the rows that come out. The rows are the host's own.

Which entries of the merger's input a row is made of is asked of its gradient, family by family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, Processor, Prompt
from family_runs import batched, model_of, prompts_of
from models import tiny
from torch import Tensor, nn

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens, get_strategy, list_strategies
from vtp_plugin.errors import PruningError

VIDEO = "llava_next_video"  # which merges the patches of a video's frames, and none of a picture
WHOLE = [name for name in FAMILIES if name.startswith(("llava", "paligemma")) and name != VIDEO]  # a token is one patch
MERGING = [name for name in FAMILIES if name not in (*WHOLE, VIDEO)]
JUDGING = [name for name in list_strategies() if "judge" in get_strategy(name).fields()]
RANK = {"at": "projector", "keep_ratio": 0.4}  # l2 there


def projector_of(model: nn.Module) -> nn.Module:
    core = model.model
    if hasattr(core, "embed_vision"):
        return core.vision_tower.pooler
    found = (getattr(core, name, None) for name in ("multi_modal_projector", "connector", "merger"))
    return next((one for one in found if one is not None), None) or getattr(
        core.visual, "downsample", core.visual.merger
    )


def encoded(model: nn.Module, inputs: dict[str, Any]) -> Any:
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "image_position_ids")
    names += ("target_sizes",)
    return model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs}, return_dict=True)


def flat(rows: Any) -> Tensor:
    """Rows in whatever the host holds them, [n, D]."""
    return torch.cat([r.flatten(0, -2) for r in rows]) if isinstance(rows, (list, tuple)) else rows.flatten(0, -2)


@cache
def units_of(name: str, layout: str) -> tuple[Tensor, Tensor]:
    """Of every row of the images of a layout: its entries of the merger's input [n, m D] by gradient, and the row."""
    model, entered = model_of(name, "eager"), []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        entered.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((entered[-1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entered[-1]})

    handle = projector_of(model).register_forward_pre_hook(enter, with_kwargs=True)
    rows = flat(encoded(model, batched(FAMILIES[name], prompts_of(name, layout))).pooler_output)
    handle.remove()
    (x,), units = entered, []
    for row in rows:
        (gradient,) = torch.autograd.grad(row.square().sum(), x, retain_graph=True)
        made_of = (gradient != 0).any(-1)  # patches, or units where the host has put them side by side
        units.append(x.detach()[made_of].flatten())
    return torch.stack(units), rows.detach()


def rows_and_kept(name: str, layout: str, **fields: Any) -> tuple[Any, list[list[int]]]:
    """The features that a pruned call is served, and the rows that are left of every image."""
    model = model_of(name, "eager")
    with torch.no_grad(), vtp.prune(model, "l2", **RANK, **fields) as pruned:
        (served,) = features_of(model, batched(FAMILIES[name], prompts_of(name, layout)))
        (event,) = pruned.events
        return served, [kept.tolist() for kept in event.kept]


def features_of(model: nn.Module, inputs: dict[str, Any]) -> list[Any]:
    """What the model of a call is given for its images; not every release puts it into the output."""
    given: list[Any] = []
    find = model.model.get_image_features

    @wraps(find)  # the host passes what its signature asks for
    def note(*args: Any, **kwargs: Any) -> Any:
        given.append(find(*args, **kwargs))
        return given[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "get_image_features", note)
        model(**inputs)
    return given


@pytest.mark.covering
@pytest.mark.parametrize("layout", ["single", "batch"])
@pytest.mark.parametrize("name", MERGING)
def test_rank_before_merge_is_the_norm_of_the_unit(name: str, layout: str) -> None:
    units, rows = units_of(name, layout)
    totals = [total for prompt in prompts_of(name, layout) for total in prompt.totals]
    for judge, judged in (("before", units), ("after", rows)):
        _, kept = rows_and_kept(name, layout, judge=judge)
        for own, found in zip(judged.split(totals), kept, strict=True):
            norms = own.double().norm(dim=-1).tolist()
            best = sorted(range(len(norms)), key=lambda i: (-norms[i], i))[: max(1, round(0.4 * len(norms)))]
            assert found == sorted(best)


@pytest.mark.parametrize("name", MERGING)
def test_a_kept_row_is_the_hosts_whoever_chose_it(name: str) -> None:
    """Bit by bit, with the deepstack rows that go with it; the choices differ."""
    model, layout, chosen = model_of(name, "eager"), "batch", []
    with torch.no_grad():
        host = encoded(model, batched(FAMILIES[name], prompts_of(name, layout)))
    levels = [host.pooler_output, *(getattr(host, "deepstack_features", None) or ())]
    starts = [0]
    for prompt in prompts_of(name, layout):
        starts += [starts[-1] + sum(prompt.totals[: n + 1]) for n in range(len(prompt.totals))]
    for judge in ("before", "after"):
        served, kept = rows_and_kept(name, layout, judge=judge)
        where = torch.tensor([start + i for start, own in zip(starts, kept, strict=False) for i in own])
        given = [served.pooler_output, *(getattr(served, "deepstack_features", None) or ())]
        assert len(given) == len(levels)
        for theirs, ours in zip(levels, given, strict=True):
            assert torch.equal(flat(theirs)[where], flat(ours))
        chosen.append(kept)
    assert chosen[0] != chosen[1]


@dataclass(kw_only=True)
class Spy(PruningStrategy):
    """Keeps everything but the last token, and what it saw."""

    name, stage, paper, needs = "spy", Stage.PROJECTOR, "none", ("units",)

    def select(self, visual: VisualTokens) -> Selection:
        SEEN.append(visual)
        keep = torch.ones(visual.tokens.shape[:2], dtype=torch.bool)
        keep[:, -1] = False
        return Selection(keep)


SEEN: list[VisualTokens] = []


@pytest.mark.parametrize("name", [n for n in MERGING if n.startswith(("qwen", "minicpmv"))])
def test_units_behind_a_cut_in_the_tower(name: str) -> None:
    """The merger makes of the units what the strategy sees as tokens; of a video, too."""
    family, model = FAMILIES[name], model_of(name, "eager")
    for prompts in (prompts_of(name, "batch"), (family.video(3),)):
        SEEN.clear()
        with torch.no_grad(), vtp.prune(model, ["l2", Spy()], processor=Processor()):
            model(**batched(family, prompts))
            merger = projector_of(model)
            for visual in SEEN:
                patches = visual.units[0].unflatten(-1, (4, -1)).flatten(0, 1)
                made = merger.mlp[0](visual.units[0]) if name.startswith("minicpmv") else merger(patches)
                torch.testing.assert_close(made, visual.tokens[0], rtol=1e-4, atol=1e-5)
        assert SEEN


@pytest.mark.parametrize("name", ["internvl", "gemma3"])
def test_units_behind_a_cut_in_a_tower_of_tiles(name: str) -> None:
    family, model = FAMILIES[name], model_of(name, "eager")
    SEEN.clear()
    with torch.no_grad(), vtp.prune(model, ["l2", Spy()], processor=Processor()):
        model(**batched(family, prompts_of(name, "batch")))
        for visual in SEEN:
            units = visual.units[0]
            if name == "internvl":
                made = projector_of(model)(units)
            else:
                projector = projector_of(model)
                mean = units.unflatten(-1, (projector.kernel_size**2, -1)).mean(1)
                made = projector.mm_soft_emb_norm(mean) @ projector.mm_input_projection_weight
            torch.testing.assert_close(made, visual.tokens[0], rtol=1e-4, atol=1e-5)
    assert SEEN


# -- LLaVA-NeXT-Video: squares of a frame's patches are averaged in front of the projector -----------------------------

SIDE, POOL, FRAMES = 4, 2, 3  # patches of a frame, of a square; of the tiny model


def film_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two clips: their pixels, the features of their patches by frame, row and column, and the host's rows."""
    values = torch.cat([FAMILIES[VIDEO].video(seed).images["pixel_values_videos"] for seed in (3, 4)])
    with torch.no_grad():
        tower = model.model.vision_tower(values.flatten(0, 1), output_hidden_states=True)
        rows = model.model.get_video_features(values, return_dict=True).pooler_output
    patches = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
    return {"pixel_values_videos": values}, patches.view(2, FRAMES, SIDE, SIDE, -1), rows.view(2, 12, -1)


def watched(model: nn.Module, inputs: dict[str, Any], **fields: Any) -> tuple[list[list[int]], list[Tensor]]:
    """What a pruned call keeps of every clip, and the rows that the language model is shown of each."""
    given: list[Tensor] = []
    with torch.no_grad(), vtp.prune(model, "l2", at="projector", keep_ratio=0.4, **fields) as pruned:
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        (event,) = pruned.events
    kept = [own.tolist() for own in event.kept]
    start = inputs["input_ids"][0].tolist().index(families.VIDEO)
    return kept, [rows[start : start + len(own)] for rows, own in zip(given[0], kept, strict=True)]


def test_squares_of_a_frame_are_judged_and_the_rows_are_the_hosts() -> None:
    """Of two clips in one call: the norm of four patches, picked out one by one; the rows are equal bit by bit."""
    family, model, chosen = FAMILIES[VIDEO], model_of(VIDEO, "eager"), []
    pixels, patches, rows = film_of(model)
    inputs = batched(family, (family.video(3), family.video(3))) | pixels
    places = [(t, y, x) for t in range(FRAMES) for y in range(0, SIDE, POOL) for x in range(0, SIDE, POOL)]
    for judge in ("before", "after"):
        kept, shown = watched(model, inputs, judge=judge)
        for clip in range(2):
            squares = [patches[clip, t, y : y + POOL, x : x + POOL].flatten() for t, y, x in places]
            norms = torch.stack(squares).norm(dim=-1) if judge == "before" else rows[clip].norm(dim=-1)
            assert kept[clip] == sorted(norms.topk(5).indices.tolist())
            assert torch.equal(shown[clip], rows[clip][kept[clip]])
        chosen.append(kept)
    assert chosen[0] != chosen[1]


def test_the_mean_of_a_unit_is_projected_to_its_row() -> None:
    family, model = FAMILIES[VIDEO], model_of(VIDEO, "eager")
    SEEN.clear()
    with torch.no_grad(), vtp.prune(model, Spy()):
        model(**batched(family, (family.video(3),)))
        (visual,) = SEEN
        means = visual.units.unflatten(-1, (POOL**2, -1)).mean(2)
        torch.testing.assert_close(model.model.multi_modal_projector(means), visual.tokens, rtol=1e-4, atol=1e-5)


def test_a_unit_of_a_picture_is_its_patch() -> None:
    """Which is what strategies see of it anyway: behind newlines and crops, too."""
    family, model = FAMILIES[VIDEO], model_of(VIDEO, "eager")
    SEEN.clear()
    with torch.no_grad(), vtp.prune(model, Spy()):
        model(**batched(family, prompts_of(VIDEO, "batch")))
    assert sum(len(visual.tokens) for visual in SEEN) == 3
    assert all(torch.equal(visual.units, visual.tokens) for visual in SEEN)


def test_every_method_that_compares_features_can_judge_before() -> None:
    """The others read the tower's attention and keys, which are from before the merger anyway, or nothing."""
    assert set(JUDGING) == {
        "l2", "divprune", "dart", "scope", "cdpruner", "prunesid", "holov", "vispruner", "mmtok", "vtp", "vscan",
        "evs", "vidcom2", "flashvid",
    }  # fmt: skip


MORE = {  # what a tiny model needs, and where features weigh enough
    "vscan": {"shallow": 1},
    "cdpruner": {"text_encoder": "llm"},
    "holov": {"context": 100, "segments": 4},
    "mmtok": {"alpha": 50},
}


@pytest.mark.parametrize("method", JUDGING)
def test_judging_before_changes_what_is_kept(method: str) -> None:
    """On a family with a merger; the default is `after`."""
    family, model, kept = FAMILIES["qwen2_vl"], model_of("qwen2_vl", "eager"), {}
    fields: dict[str, Any] = {"at": "projector"} if "at" in get_strategy(method).fields() else {}
    fields |= MORE.get(method, {})
    prompt: Prompt = family.sample(0, 2) if get_strategy(method).pictures else family.video(3)
    ratio = 0.3 if get_strategy(method).pictures else 0.6
    for judge in ("", "after", "before"):
        more = {"judge": judge} if judge else {}
        with (
            torch.no_grad(),
            vtp.prune(model, method, processor=Processor(), keep_ratio=ratio, **fields, **more) as pruned,
        ):
            model(**batched(family, (prompt,)))
            rows = [event.kept for event in pruned.events]
            kept[judge] = [r.tolist() for own in rows for r in own]
    assert kept[""] == kept["after"]
    if method != "vscan":  # whose features decide who is merged with whom, not who stays
        assert kept["before"] != kept["after"]


def test_vscan_merges_by_what_it_judges() -> None:
    """The survivors are the same, their values are not."""
    family, model, rows = FAMILIES["qwen2_vl"], model_of("qwen2_vl", "eager"), {}
    for judge in ("after", "before"):
        with torch.no_grad(), vtp.prune(model, "vscan", shallow=1, keep_ratio=0.3, judge=judge):
            (served,) = features_of(model, batched(family, (family.sample(0, 1),)))
            rows[judge] = flat(served.pooler_output)
    assert rows["before"].shape == rows["after"].shape
    assert not torch.equal(rows["before"], rows["after"])


@pytest.mark.parametrize("name", [*WHOLE, "llava_hf"])
def test_a_model_that_merges_nothing_is_refused(name: str) -> None:
    model = tiny("llava_hf").model if name == "llava_hf" else model_of(name, "sdpa")
    with pytest.raises(PruningError, match=r"^divprune: judge=before .* a token of .* is one patch") as error:
        vtp.prune(model, "divprune", judge="before")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        ("divprune", {"judge": "never"}, "divprune: judge must be one of after, before, got 'never'"),
        ("dart", {"judge": "before"}, "dart: judge must be after at the llm stage, got 'before'"),
        ("l2", {"judge": "before"}, "l2: judge must be after at the vit stage, got 'before'"),
        ("fastv", {"judge": "before"}, "unknown field 'judge' for 'fastv'"),
    ],
)
def test_what_judge_may_be(method: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(PruningError, match=rf"^{said}"):
        vtp.prune(families.FAMILIES["qwen2_vl"].build("sdpa"), method, **fields)


def test_the_preset_is_plain_rank_before_merge() -> None:
    with vtp.prune(model_of("qwen2_vl", "sdpa"), "l2:before_merge") as pruned:
        (strategy,) = pruned.strategies
    assert (strategy.stage, strategy.judge) == (Stage.PROJECTOR, "before")
