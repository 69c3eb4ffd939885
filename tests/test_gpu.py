"""The promises on a GPU: random weights in the shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B, and every family, tiny.

Needs torch, transformers and pytest alone: `pytest tests/test_gpu.py -m gpu` on a machine with a CUDA device. The same
code runs with tiny shapes on the CPU in every other session, so that it is known to work.

Tolerances are relative errors of logits, |a - b| / |b| over all of them, against a reference in the same dtype that is
never cut by hooks: shorter embeddings, or a mask, without a cache. What 28 or 32 layers round in bf16 is measured, not
guessed: the pruned model may be twice as far from its reference as the unpruned host is from its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as remembered
from functools import lru_cache
from inspect import unwrap
from itertools import product
from types import SimpleNamespace
from typing import Any

import pretend_hosts
import pytest
import syncs
import torch
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available

import vtp_plugin as vtp
from vtp_plugin import fused, replay, selectors
from vtp_plugin.surgery import cache

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.003, torch.bfloat16: 0.02}  # four layers
TWICE = 2  # as far as the unpruned host from its own reference: at the depth of a real model
NEW, IMAGE, LAYER, LAYERS = 4, 5, 2, 4
torch.backends.cudnn.allow_tf32 = False  # a convolution is computed otherwise for every size of a batch
STRATEGIES = {
    "l2": {"keep_ratio": 0.5},
    "stride": {"keep_ratio": 0.25},
    "atp": {"alpha": 0.0, "keep_ratio": 0.4},
    "fastv": {"layer": LAYER, "keep_ratio": 0.3},
}


@dataclass(frozen=True)
class Setting:
    """One model on one device."""

    family: str  # llava or qwen
    size: str  # tiny, wide (as a real one, with four layers) or real
    dtype: torch.dtype
    attention: str
    device: str

    def __str__(self) -> str:
        return f"{self.family}-{self.size}-{str(self.dtype)[6:]}-{self.attention}-{self.device}"


ON_DEVICE = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
WITH_FLASH = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")


def settings() -> Iterator[Any]:
    for family in ("llava", "qwen"):
        on_cpu = [Setting(family, "tiny", dtype, "sdpa", "cpu") for dtype in TOLERANCE]
        halves = product(("tiny", "wide"), (torch.float32, torch.float16))
        there = [Setting(family, size, dtype, "sdpa", "cuda") for size, dtype in halves]
        there += [Setting(family, "real", torch.bfloat16, name, "cuda") for name in ("sdpa", "flash_attention_2")]
        for one in on_cpu + there:
            marks = [*(ON_DEVICE if one.device == "cuda" else ()), *([WITH_FLASH] if "flash" in one.attention else ())]
            yield pytest.param(one, id=str(one), marks=[*marks, pytest.mark.xdist_group(str(one))])  # built once


@pytest.fixture(params=settings(), scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    return built(request.param)


@lru_cache(maxsize=1)  # two models of real size need not share a device
def built(setting: Setting) -> nn.Module:
    cls, config = (llava if setting.family == "llava" else qwen)(setting.size == "tiny")
    if setting.size == "wide":
        config.text_config.num_hidden_layers = LAYERS
        config.vision_config.num_hidden_layers = config.vision_config.depth = LAYERS
        config.text_config.layer_types = (getattr(config.text_config, "layer_types", None) or [])[:LAYERS] or None
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = cls._from_config(config, dtype=setting.dtype, attn_implementation=setting.attention).eval()
    if setting.size == "tiny":
        for parameter in model.parameters():  # a timid model gives everything the same answer
            if parameter.ndim > 1:
                parameter.data.mul_(4)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.lm_head.weight.data[IMAGE] = 0
    return model


def llava(tiny: bool) -> tuple[type, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32 if tiny else 1024,
        intermediate_size=64 if tiny else 4096,
        num_hidden_layers=4 if tiny else 24,
        num_attention_heads=4 if tiny else 16,
        image_size=56 if tiny else 336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=100 if tiny else 32064,
        hidden_size=64 if tiny else 4096,
        intermediate_size=96 if tiny else 11008,
        num_hidden_layers=4 if tiny else 32,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=4 if tiny else 32,
        pad_token_id=0,
    )
    tokens = (vision.image_size // 14) ** 2
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=tokens)
    return LlavaForConditionalGeneration, config


def qwen(tiny: bool) -> tuple[type, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 4 if tiny else 32,
        "hidden_size": 32 if tiny else 1280,
        "intermediate_size": 64 if tiny else 3420,
        "num_heads": 4 if tiny else 16,
        "out_hidden_size": 64 if tiny else 3584,
        "fullatt_block_indexes": [1] if tiny else [7, 15, 23, 31],
        "patch_size": 14,
        "window_size": 112,
    }
    text = {
        "vocab_size": 100 if tiny else 152064,
        "hidden_size": 64 if tiny else 3584,
        "intermediate_size": 96 if tiny else 18944,
        "num_hidden_layers": 4 if tiny else 28,
        "num_attention_heads": 4 if tiny else 28,
        "num_key_value_heads": 2 if tiny else 4,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3] if tiny else [16, 24, 24],
            "rope_theta": 1e6,
        },
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=6)
    return Qwen2_5_VLForConditionalGeneration, config


# -- prompts ----------------------------------------------------------------------------------------------------------


def prompts(model: nn.Module) -> list[dict[str, Any]]:
    """A prompt with two images and a shorter one with one."""
    return [one(model, images, 10 + 7 * images) for images in (2, 1)]


def one(model: nn.Module, images: int, words: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(images)
    tokens, pixels = vision_inputs(model, images, draw)
    text = torch.randint(8, 99, (words,), generator=draw).tolist()
    ids = text[:3] + [token for count in tokens for token in [IMAGE] * count + text[3:5]] + text[5:]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    return on_device(model, inputs | pixels)


def vision_inputs(model: nn.Module, images: int, draw: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    tiny = model.config.get_text_config().hidden_size == 64
    if hasattr(model.model, "visual"):
        grid = (1, 8, 8) if tiny else (1, 32, 36)
        patches = images * grid[1] * grid[2]
        values = torch.randn(patches, 3 * 2 * 14 * 14, generator=draw)
        return [grid[1] * grid[2] // 4] * images, {
            "pixel_values": values,
            "image_grid_thw": torch.tensor([grid] * images),
        }
    config = model.config.vision_config
    size = config.image_size
    return [(size // 14) ** 2] * images, {"pixel_values": torch.randn(images, 3, size, size, generator=draw)}


def on_device(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    values = inputs["pixel_values"].to(model.dtype)
    inputs = {**inputs, "pixel_values": values}
    if hasattr(model.model, "visual"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return {name: value.to(model.device) for name, value in inputs.items()}


def together(model: nn.Module) -> dict[str, Any]:
    """Both prompts, padded on the left."""
    both = prompts(model)
    longest = max(p["input_ids"].shape[1] for p in both)

    def padded(name: str) -> Tensor:
        pads = [longest - p[name].shape[1] for p in both]
        return torch.cat([nn.functional.pad(p[name], (pad, 0)) for p, pad in zip(both, pads, strict=True)])

    wide = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {n: padded(n) if n in wide else torch.cat([p[n] for p in both]) for n in both[0]}


# -- references -------------------------------------------------------------------------------------------------------


class Reference:
    """One prompt, its decisions given, without a cache and without a hook of the package."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], kept: list[Tensor], stage: str) -> None:
        self.model, self.inputs, self.kept, self.stage = model, inputs, kept, stage
        self.ids = inputs["input_ids"][0]
        placeholders = (self.ids == IMAGE).nonzero().flatten()
        self.spans = placeholders.view(len(kept), -1)
        chosen = torch.cat([span[k.to(span.device)] for span, k in zip(self.spans, kept, strict=True)])
        self.left = torch.ones_like(self.ids, dtype=torch.bool).index_fill_(0, placeholders, False)
        self.left[chosen] = True

    @torch.no_grad()
    def logits(self, rows: Tensor, answer: list[int]) -> Tensor:
        """Of the last prompt token and every token of the answer but the last; `rows` of the images are given."""
        embed = self.model.get_input_embeddings()
        embeds, keep = embed(self.ids.masked_fill(self.ids == IMAGE, 0)), self.left.clone()
        embeds[self.ids == IMAGE] = rows.to(embeds)
        if self.stage == "llm":
            keep[:] = True
        later = embed(torch.tensor(answer[:-1], device=self.ids.device))
        embeds = torch.cat([embeds[keep], later])[None]
        with self._hidden(len(later)), kernel(self.model, "sdpa"):
            hidden = self.model.model.language_model(
                inputs_embeds=embeds, position_ids=self._positions(keep, len(later)), use_cache=False
            )[0]
        return self.model.lm_head(hidden)[0, -len(answer) :].float()

    def _positions(self, keep: Tensor, new: int) -> Tensor:
        core, after = self.model.model, torch.arange(new, device=keep.device)
        if not hasattr(core, "get_rope_index"):
            return torch.arange(int(keep.sum()) + new, device=keep.device)[None]
        names = ("mm_token_type_ids", "image_grid_thw")
        table, delta = core.get_rope_index(self.ids[None], **{n: self.inputs[n] for n in names})
        later = (after + len(self.ids) + delta[0]).expand(3, 1, -1)
        return torch.cat([table[:, :, keep].to(later), later], -1)

    @contextmanager
    def _hidden(self, new: int) -> Iterator[None]:
        """llm stage: a mask from the cut layer on."""
        if self.stage != "llm":
            yield
            return
        seen = torch.cat([self.left, self.left.new_ones(new)])
        length = len(seen)
        causal = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
        mask = (causal & (seen | torch.eye(length, dtype=torch.bool, device=seen.device)))[None, None]

        def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        layers = self.model.model.language_model.layers[LAYER:]
        handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
        yield
        for handle in handles:
            handle.remove()


@contextmanager
def kernel(model: nn.Module, attention: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def watched(module: nn.Module, seen: list[Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True)
    yield
    handle.remove()


def generated(model: nn.Module, inputs: dict[str, Any]) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **settings)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def rows_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The projected rows of all images."""
    names = {"pixel_values": inputs["pixel_values"]}
    names |= {n: inputs[n] for n in ("image_grid_thw",) if n in inputs}
    with torch.no_grad():
        rows = torch.cat(list(model.model.get_image_features(**names, return_dict=True).pooler_output))
    return rows.flatten(0, -2)


PROCESSOR = SimpleNamespace(
    image_processor=SimpleNamespace(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=True, preprocess=lambda images: images
    ),
    tokenizer=None,
)


# -- the promises -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keeping_everything_and_detaching_change_no_bit(model: nn.Module):
    inputs = together(model)
    before = model(**inputs).logits
    for strategy in STRATEGIES:
        fields = {**STRATEGIES[strategy], "keep_ratio": 1.0}
        with vtp.prune(model, strategy, processor=PROCESSOR, **fields):
            assert model(**inputs).logits.equal(before), strategy
        assert model(**inputs).logits.equal(before), strategy


@pytest.mark.parametrize("strategy", ["stride", "atp", "fastv"])
@torch.no_grad()
def test_cached_generation_equals_the_uncut_reference(model: nn.Module, strategy: str):
    """Every prompt alone, and both in one left-padded batch with three images."""
    stage = "llm" if strategy == "fastv" else "projector"
    with vtp.prune(model, strategy, processor=PROCESSOR, **STRATEGIES[strategy]) as pruned:
        alone = []
        for inputs in prompts(model):
            output = generated(model, inputs)
            alone.append((output, kept_of(pruned)))
        batch, kept = generated(model, together(model)), kept_of(pruned)
    owned = [k for _, own in alone for k in own]
    assert list(map(len, owned)) == list(map(len, kept))
    if strategy == "stride" or (stage == "projector" and model.device.type == "cpu"):
        assert all(a.equal(b) for a, b in zip(owned, kept, strict=True))  # elsewhere a batch rounds otherwise
    rest = list(kept)
    for row, (inputs, (output, own)) in enumerate(zip(prompts(model), alone, strict=True)):
        whole = rows_of(model, inputs)
        check(model, inputs, own, stage, whole, output, 0)
        theirs, rest = rest[: len(own)], rest[len(own) :]
        check(model, inputs, theirs, stage, whole, batch, row)


def kept_of(pruned: Any) -> list[Tensor]:
    kept = {n: k for event in pruned.events for n, k in zip(event.images, event.kept, strict=True)}
    pruned.events.clear()
    return [kept[number] for number in sorted(kept)]


def check(
    model: nn.Module, inputs: dict[str, Any], kept: list[Tensor], stage: str, rows: Tensor, output: Any, row: int
):
    answer = output.sequences[row, -NEW:].tolist()
    found = torch.stack([step[row] for step in output.logits])
    expected = Reference(model, inputs, kept, stage).logits(rows, answer)
    assert error(found, expected) < tolerance(model)
    size = len(rows) // len(kept)
    others = [torch.tensor([i for i in range(size) if i not in own.tolist()][: len(own)]) for own in kept]
    wrong = error(found, Reference(model, inputs, others, stage).logits(rows, answer))
    assert wrong > 2 * error(found, expected)  # a reference with other tokens does not fit


@remembered
def tolerance(model: nn.Module) -> float:
    """How far logits may be from the reference's; in a deep model by how far the unpruned host's own are."""
    if model.config.get_text_config().num_hidden_layers == LAYERS:
        return TOLERANCE[model.dtype]
    far, batch = [], generated(model, together(model))
    for row, inputs in enumerate(prompts(model)):
        rows, images = rows_of(model, inputs), 2 - row
        everything = [torch.arange(len(rows) // images)] * images
        for output, place in ((generated(model, inputs), 0), (batch, row)):
            found = torch.stack([step[place] for step in output.logits])
            reference = Reference(model, inputs, everything, "projector")
            far.append(error(found, reference.logits(rows, output.sequences[place, -NEW:].tolist())))
    return TWICE * max(far)


@torch.no_grad()
def test_kept_are_the_highest_fp32_scores(model: nn.Module):
    """Scores are restated in fp32 from what the layer worked on; no dropped token has a higher one than a kept one."""
    inputs, seen = prompts(model)[1], []
    layer = model.model.language_model.layers[LAYER - 1].self_attn
    with vtp.prune(model, "fastv", **STRATEGIES["fastv"]) as pruned, watched(layer, seen):
        model(**inputs)
        (kept,) = kept_of(pruned)
    scores = last_row(layer, *seen[0])[(inputs["input_ids"][0] == IMAGE)]
    assert len(kept) == round(0.3 * len(scores))
    dropped = torch.ones_like(scores, dtype=torch.bool)
    dropped[kept.to(scores.device)] = False
    assert scores[~dropped].min() >= scores[dropped].max() - 1e-6


def last_row(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Softmax of the last token's row in fp32, mean over heads, from the layer's own projections."""
    hidden = args[0] if args else kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]
    q, k = (p(hidden).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    q, k = turned(q).float()[0, :, -1], turned(k).float()[0]
    k = k.repeat_interleave(len(q) // len(k), 0)
    return (torch.einsum("hd,hld->hl", q, k) * layer.head_dim**-0.5).softmax(-1).mean(0)


@torch.no_grad()
def test_budgets_hold_in_every_layer(model: nn.Module):
    inputs = prompts(model)[0]
    length = inputs["input_ids"].shape[1]
    images = int((inputs["input_ids"] == IMAGE).sum()) // 2
    with vtp.prune(model, "l2+fastv", processor=PROCESSOR, **{"l2.keep_ratio": 0.5, "fastv.keep_ratio": 0.5}):
        stored = cache.of_output(generated(model, inputs))
    early = int(images * 0.5)
    late = round(early * 0.5)
    lengths = [layer.keys.shape[2] for layer in stored.layers]
    wanted = [length - 2 * (images - (early if n < LAYER else late)) + NEW - 1 for n in range(len(lengths))]
    assert lengths == wanted


@pytest.mark.parametrize("positions", ["original", "compact"])
@torch.no_grad()
def test_both_positions_run(model: nn.Module, positions: str):
    with vtp.prune(model, "stride+fastv", keep_ratio=0.25, positions=positions):
        assert all(step.isfinite().all() for step in generated(model, together(model)).logits)


# -- every family -----------------------------------------------------------------------------------------------------

COMBINATIONS = [(name, stage) for name, stages in pretend_hosts.STAGES.items() for stage in stages]
ROUNDING = [("l2", {"center": True})]  # patches of one colour, of which rounding alone is left
ALIKE = 1e-3  # of logits in fp32, between the CPU and a device
WAITS = syncs.WAITS + syncs.COPIES  # a device that is given numbers of the host is waited for, too


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "stage"), COMBINATIONS, ids=lambda value: value)
def test_a_family_answers_as_on_the_cpu(name: str, stage: str) -> None:
    """Two strategies in turn: what is kept, the logits, and how often the host waits more than for the unpruned one."""
    if name == "llava":
        pytest.importorskip("llava")
    one, turn = pretend_hosts.host(name), list(pretend_hosts.STAGES).index(name)
    able = [case for case in pretend_hosts.CASES[stage] if pretend_hosts.can(name, *case) and case not in ROUNDING]
    _, unpruned = one.on_device("cuda", None, "batch")
    for strategy, fields in (able[turn % len(able)], able[(turn + 1) % len(able)]):
        chosen = one.strategy(strategy, **fields)
        (there, waits), here = one.on_device("cuda", chosen, "batch"), one.here(chosen, "batch")
        assert there.kept == here.kept, strategy
        assert error(there.logits.cpu(), here.logits) < ALIKE, strategy
        if chosen.budgeted and strategy not in syncs.ON_HOST:
            assert waits - unpruned <= WAITS, strategy


# -- greedy selections ------------------------------------------------------------------------------------------------

SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "farthest_points": lambda x: selectors.farthest_points(selectors.distances(x), 20),
    "weighted farthest_points": lambda x: selectors.farthest_points(selectors.distances(x), 20, x.square().mean(-1)),
    "coverage": lambda x: selectors.coverage(selectors.gaussian(x, 0.5), torch.ones_like(x[..., 0]), 20),
    "coverage_at_once": lambda x: selectors.stepped_coverage(selectors.gaussian(x, 0.5), x.square().mean(-1), 20),
    "herding": lambda x: selectors.herding(selectors.gaussian(x, 0.5), torch.arange(3).to(x.device).expand(2, -1), 20),
    "determinantal": lambda x: selectors.determinantal(selectors.cosines(x), 20, x.mean(-1)),
    "smallest": lambda x: selectors.smallest(selectors.distances(x).flatten(1), 1000),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SELECTIONS)
@torch.no_grad()
def test_a_selection_that_is_replayed_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel does it all: recorded once, on the third call. Those that it asks are recorded beside it."""
    monkeypatch.setattr(fused, "undisturbed", lambda tensors: False)
    monkeypatch.setattr(replay, "_recorded", OrderedDict())
    monkeypatch.setattr(replay, "_calls", Counter())
    draw, own = torch.Generator().manual_seed(0), unwrap(getattr(selectors, name.split()[-1]))
    for number in range(replay.SEEN + 3):
        x = torch.randn(2, 60, 16, generator=draw).cuda()
        found = SELECTIONS[name](x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replay, "_worthwhile", lambda tensors: False)
            assert found.equal(SELECTIONS[name](x))
        recorded = [function for function, *_ in replay._recorded]
        assert recorded.count(own) == (number >= replay.SEEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (60, 60), (576, 144), (577, 577), (2928, 732)])
@torch.no_grad()
def test_a_kernel_finds_the_bits_of_what_it_replaces(n: int, k: int) -> None:
    """Three images, one of which has twelve kinds of tokens only; for each of the selections that are `fused`."""
    kernels, draw = pytest.importorskip("vtp_plugin.kernels"), torch.Generator().manual_seed(n)
    x, first = torch.randn(3, n, 24, generator=draw), torch.rand(3, n, generator=draw).argsort()[:, : (k + 1) // 2]
    x[1] = x[1, torch.arange(n) % 12 % n]
    x, first, weight = x.cuda(), first.cuda(), torch.rand(3, n, generator=draw).cuda()
    apart, alike = selectors.distances(x), selectors.gaussian(x, 0.5)
    for name, *given in (
        ("farthest_points", apart, k),
        ("farthest_points", apart, k, weight),
        ("herding", alike, first, k),
        ("coverage_at_once", alike, torch.ones_like(weight), k),
        ("coverage_at_once", alike, weight, k),
        *(("smallest", apart.flatten(1), place) for place in (0, (n * n - 1) // 2, n * n - 1)),
    ):
        expected = unwrap(getattr(selectors, name))(*given)
        assert getattr(kernels, name)(*given).equal(expected), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_where_nothing_is_a_number_a_kernel_picks_from_what_is_there() -> None:
    kernels, nothing = pytest.importorskip("vtp_plugin.kernels"), torch.full((2, 70, 70), float("nan"), device="cuda")
    ascending = torch.arange(20, device="cuda").expand(2, -1)
    assert kernels.farthest_points(nothing, 20).equal(ascending)
    assert kernels.herding(nothing, ascending[:, :1], 20).equal(ascending)
    assert kernels.coverage_at_once(nothing, nothing[0, :2], 20).equal(ascending)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["vtp", "divprune"])
@torch.no_grad()
def test_a_greedy_strategy_launches_fewer_kernels_than_it_picks(name: str) -> None:
    pytest.importorskip("vtp_plugin.kernels")
    x = torch.randn(1, 576, 64, generator=torch.Generator().manual_seed(0)).cuda()
    index = torch.arange(576, device="cuda")[None]
    visual = vtp.VisualTokens(tokens=x, grid=(24, 24), index=index, projected=x)
    strategy = vtp.get_strategy(name)(keep_tokens=288)
    strategy.select(visual)  # kernels are made
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        strategy.select(visual)
        torch.cuda.synchronize()
    launched = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launched) < 288
    assert fused.failed == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@torch.no_grad()
def test_a_model_over_several_devices(tmp_path: Any):
    from transformers import AutoModelForImageTextToText

    model = built(Setting("llava", "tiny", torch.float32, "sdpa", "cpu"))
    model.save_pretrained(tmp_path)
    spread = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto", dtype=torch.float32)
    inputs = together(model)
    with vtp.prune(model, "stride+fastv", keep_ratio=0.25):
        expected = model(**inputs).logits
    with vtp.prune(spread, "stride+fastv", keep_ratio=0.25):
        found = spread(**on_device(spread, inputs)).logits
    assert error(found.cpu(), expected) < TOLERANCE[torch.float32]
