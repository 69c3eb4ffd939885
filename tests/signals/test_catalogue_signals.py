"""What strategies are told is what the model computes: every new signal against the host's own tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import families
import models
import pytest
import torch

from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens, get_strategy, prune
from vtp_plugin.metrics.counting import selector_macs

LAYER = 2
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@dataclass(kw_only=True)
class Probe(PruningStrategy):
    """Keeps all but the last token and remembers what it saw."""

    name = "probe"
    paper = "test"
    at: str = "llm"
    wants: tuple[str, ...] = ()
    seen: list[VisualTokens] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return Stage(self.at)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.wants

    @property
    def tower_layer(self) -> int:
        return -1

    @property
    def decoder_layer(self) -> int | None:
        return LAYER if self.at == "llm" else None

    def select(self, visual: VisualTokens) -> Selection:
        self.seen.append(visual)
        keep = torch.ones_like(visual.index, dtype=torch.bool)
        keep[:, -1] = False
        return Selection(keep)


@pytest.fixture
def host() -> Any:
    return models.tiny("llava_hf", "eager")


def bias_of(width: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """All-ones vectors turned by their positions: every pair (1, 1) turns by the same angle, so distances count."""
    angles = [10000.0 ** (-2 * i / width) for i in range(width // 2)]
    return torch.tensor(
        [[sum(2 * math.cos((q - k) * a) for a in angles) / width**0.5 for k in keys.tolist()] for q in queries.tolist()]
    )


@torch.no_grad()
def test_signals_of_the_language_model(host: Any):
    row = models.prompts("single")
    wants = ("last_query_attention", "next_query_attention", "text_attention", "entry", "text_entry")
    wants = (*wants, "head_attention", "rotary_bias")
    wants = (*wants, "key_norms", "text_key_norms", "normed", "text_normed", "values", "outputs")
    probe, outputs = Probe(wants=wants), []
    with host.prune(probe):
        host.forward(row)
    (seen,) = probe.seen
    inputs = host.inputs(row)
    last = host.decoder.layers[LAYER - 1].self_attn.o_proj
    handle = last.register_forward_pre_hook(lambda module, args: outputs.append(args[0][0]))
    full = host.model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
    handle.remove()
    ids = inputs["input_ids"][0]
    image = (ids == models.PLACEHOLDER).nonzero().flatten()
    text = torch.arange(int(image[-1]) + 1, len(ids))
    before, behind = (full.attentions[layer][0].mean(0) for layer in (LAYER - 1, LAYER))
    keys = full.past_key_values.layers[LAYER - 1].keys[0].abs().sum((0, 2))
    hidden, norm, heads = full.hidden_states, host.decoder.norm, host.decoder.config.num_attention_heads
    expected = {
        "last_query_attention": before[-1, image],
        "next_query_attention": behind[-1, image],
        "text_attention": before[text][:, image],
        "head_attention": full.attentions[LAYER - 1][0][:, text][:, :, image],
        "rotary_bias": bias_of(host.decoder.config.head_dim, text, image),
        "entry": hidden[0][0, image],
        "text_entry": hidden[0][0, text],
        "key_norms": keys[image],
        "text_key_norms": keys[text],
        "normed": norm(hidden[LAYER][0, image]),
        "text_normed": norm(hidden[LAYER][0, text]),
        "values": full.past_key_values.layers[LAYER - 1].values[0][:, image],
        "outputs": outputs[0].unflatten(-1, (heads, -1)).transpose(0, 1)[:, text],
    }
    for name, value in expected.items():
        assert torch.allclose(getattr(seen, name)[0], value, **CLOSE), name
    assert (seen.cut, seen.entered, seen.layer) == ((0, 1), len(image), LAYER)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3", "paligemma2"])
@torch.no_grad()
def test_outputs_where_heads_share_keys_and_layers_have_windows(name: str):
    """What the layer's output projection is given for the text behind the image."""
    family, outputs = families.FAMILIES[name], []
    model, inputs = family.build("sdpa"), family.batch([family.sample(0, 1)])
    probe, layer = Probe(wants=("values", "outputs", "head_attention")), model.model.language_model.layers[LAYER - 1]
    with prune(model, probe, processor=families.Processor()):
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0][0]))
        model(**inputs)
        handle.remove()
    (seen,), ids = probe.seen, inputs["input_ids"][0]
    text = torch.arange(int((ids == families.IMAGE).nonzero()[-1]) + 1, len(ids))
    heads, behind = seen.outputs.shape[1], seen.outputs[0][:, -len(text) :]  # in front of them: rows of newlines
    assert torch.allclose(behind, outputs[0].unflatten(-1, (heads, -1)).transpose(0, 1)[:, text], **CLOSE)
    assert seen.values.shape[1] == heads == seen.head_attention.shape[1]


TOWER = ("projected", "class_query", "class_key", "raw_keys", "patch_values", "cls_attention", "heads")
BLOCKS = {"shallow_attention": 1, "shallow_received": 1, "received": -1}


@dataclass(kw_only=True)
class Shallow(Probe):
    shallow_layer = 1


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_attention_of_two_blocks(host: Any, name: str):
    row, probe = models.prompts("single"), Shallow(at="projector", wants=(name,))
    with host.prune(probe):
        host.forward(row)
    tower = host.tower(host.inputs(row)["pixel_values"], output_attentions=True)
    heads = tower.attentions[BLOCKS[name]].mean(1)  # [B, 1 + N, 1 + N]
    wanted = heads[:, 0] if name == "shallow_attention" else heads.mean(1)
    assert torch.allclose(getattr(probe.seen[0], name), wanted[:, 1:], **CLOSE)


def test_a_block_that_is_not_there_is_refused(host: Any):
    with pytest.raises(
        ValueError,
        match=r"^hiprune: shallow must be in -4 \.\.\. 3 for this model, got 8: its vision tower has 4 blocks$",
    ):
        host.prune("hiprune")


@torch.no_grad()
def test_signals_of_tower_and_projector(host: Any):
    row = models.prompts("single")
    probe = Probe(at="projector", wants=TOWER)
    with host.prune(probe):
        host.forward(row)
    (seen,) = probe.seen
    pixels = host.inputs(row)["pixel_values"]
    tower = host.tower(pixels, output_hidden_states=True)
    features = tower.hidden_states[-2][:, 1:]
    assert torch.allclose(seen.tokens, features, **CLOSE)
    assert torch.allclose(seen.projected, host.projector(features), **CLOSE)
    block = getattr(host.tower, "vision_model", host.tower).encoder.layers[-1]
    normed = block.layer_norm1(tower.hidden_states[-2])
    assert torch.allclose(seen.raw_keys, block.self_attn.k_proj(normed)[:, 1:], **CLOSE)
    assert torch.allclose(seen.class_query, block.self_attn.q_proj(normed)[:, 0], **CLOSE)
    assert torch.allclose(seen.patch_values, block.self_attn.v_proj(normed)[:, 1:], **CLOSE)
    assert torch.allclose(seen.class_key, block.self_attn.k_proj(normed)[:, 0], **CLOSE)
    eager = host.tower(pixels, output_attentions=True).attentions[-1][:, :, 0, 1:]
    assert torch.allclose(seen.heads * seen.cls_attention, eager.sum(1), **CLOSE)


# -- whole calls ------------------------------------------------------------------------------------------------------

EVERY = ["fastervlm", "hired", "vispruner", "divprune", "cdpruner", "scope", "pooling", "prumerge", "prumerge_plus"]
EVERY += ["dart", "pixelprune", "pyramiddrop", "sparsevlm", "vtp", "downsample", "holov", "hiprune", "vscan", "nuwa"]
EVERY += ["prunesid", "coreprune", "unpad"]
SHALLOW = {"hiprune": {"shallow": 1}, "vscan": {"shallow": 1}, "coreprune": {"layer": 2}}  # towers of four blocks


def make(host: Any, name: str, **hyper: Any) -> PruningStrategy:
    cls = get_strategy(name)
    hyper = {**SHALLOW.get(name, {}), **hyper}
    return cls(**hyper, **({"clip": str(host.clip)} if "clip" in cls.fields() else {}))


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_batch_is_its_rows_and_nothing_is_left_behind(name: str):
    host, rows = models.tiny("llava_hf", "sdpa"), models.prompts("batch")
    before = host.generate(rows, max_new_tokens=2)
    with host.prune(make(host, name)):
        together = host.generate(rows, max_new_tokens=2)
        alone = [host.generate([row], max_new_tokens=2) for row in rows]
        uncached = host.generate(rows, max_new_tokens=2, use_cache=False)
    for i, one in enumerate(alone):
        assert together.sequences[i].equal(one.sequences[0])
        assert torch.allclose(together.logits[0][i], one.logits[0][0], atol=2e-4, rtol=1e-4)
    assert together.sequences.equal(uncached.sequences)
    after = host.generate(rows, max_new_tokens=2)
    assert all(a.equal(b) for a, b in zip(before.logits, after.logits, strict=True))


@pytest.mark.parametrize("name", [n for n in EVERY if "keep_ratio" in get_strategy(n).fields()])
@torch.no_grad()
def test_keeping_everything_changes_no_bit(name: str):
    host, rows = models.tiny("llava_hf", "sdpa"), models.prompts("batch")
    before = host.generate(rows, max_new_tokens=2)
    with host.prune(make(host, name, keep_ratio=1.0)):
        after = host.generate(rows, max_new_tokens=2)
    assert all(a.equal(b) for a, b in zip(before.logits, after.logits, strict=True))


@torch.no_grad()
def test_strategies_of_several_cuts_share_their_layers():
    host, rows = models.tiny("llava_hf", "sdpa"), models.prompts("batch")
    chosen = [
        make(host, "pyramiddrop", layers="1 3"),
        make(host, "sparsevlm"),
        make(host, "fastv", layer=1, positions="compact"),
    ]
    with host.prune(chosen) as pruned:
        together = host.generate(rows)
        alone = [host.generate([row]) for row in rows]
    assert {(e.strategy, e.layer) for e in pruned.events} == {
        *(("pyramiddrop", layer) for layer in (1, 3)),
        *(("sparsevlm", layer) for layer in (1, 2, 3)),
        ("fastv", 1),
    }
    assert all(together.sequences[i].equal(one.sequences[0]) for i, one in enumerate(alone))


@pytest.mark.parametrize("name", ["random", "stride"])
@torch.no_grad()
def test_controls_may_cut_the_language_model_too(name: str):
    host, rows = models.tiny("llava_hf", "sdpa"), models.prompts("single")
    with host.prune([make(host, name, at="llm"), make(host, "downsample")]) as pruned:
        host.generate(rows, max_new_tokens=2)
    assert [(event.strategy, event.before, event.after) for event in pruned.events] == [
        ("downsample", [36], [9]),
        (name, [9], [4]),
    ]


@torch.no_grad()
def test_patches_of_a_small_picture_can_be_dropped_like_any_other():
    host, rows = models.tiny("llava_hf", "sdpa"), models.prompts("batch")
    with host.prune([make(host, "downsample", keep_tokens=20), make(host, "l2", center=True)]):
        together = host.generate(rows, max_new_tokens=2)
        alone = [host.generate([row], max_new_tokens=2) for row in rows]
    assert all(together.sequences[i].equal(one.sequences[0]) for i, one in enumerate(alone))


@torch.no_grad()
def test_projecting_the_candidates_is_part_of_the_cost():
    host, calls = models.tiny("llava_hf", "sdpa"), []
    with host.prune(make(host, "divprune")) as pruned:
        pruned.finished.append(lambda call: calls.append(selector_macs(pruned, call, 0)))
        host.forward(models.prompts("single"))
    weights = sum(p.numel() for p in host.projector.parameters() if p.ndim == 2)
    assert calls == [models.N * weights]
