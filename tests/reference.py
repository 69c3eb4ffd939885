"""Slow references: every method and every model part restated with loops, without a cache, one sample at a time.

Written from the methods' descriptions. Nothing is imported from vtp_plugin: what is compared here was computed twice.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import GRID, NEW, PATCH, N, Tiny, words
from torch import Tensor, nn

# -- methods ----------------------------------------------------------------------------------------------------------


def best(scores: Sequence[float], k: int) -> list[int]:
    """The k highest, ties to the lower index, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def floor(exact: float) -> int:
    return max(1, math.floor(exact + 1e-6))


def nearest(exact: float) -> int:
    return max(1, math.floor(exact + 0.5))


def l2_scores(embeddings: Tensor) -> list[float]:
    """[N, D] -> norms."""
    return [math.sqrt(sum(v * v for v in row)) for row in embeddings.double().tolist()]


def scaled(values: Sequence[float], how: str) -> list[float]:
    """ATP's N(.)."""
    if how == "minmax":
        low, high = min(values), max(values)
        return [(v - low) / (high - low + 1e-6) for v in values]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / (spread + 1e-6) for v in values]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / size if size > 0 else 0.0


def atp_scores(
    attention: Tensor | None, patches: Tensor | None, text: Tensor | None, alpha: float, sign: int = 1, how="minmax"
) -> list[float]:
    """alpha N(sign cos(patch, text)) + (1 - alpha) N(attention)."""
    n = len(attention if attention is not None else patches)
    intra, inter = [0.0] * n, [0.0] * n
    if attention is not None:
        intra = scaled(attention.double().tolist(), how)
    if patches is not None:
        words = text.double().tolist()
        inter = scaled([sign * cosine(patch, words) for patch in patches.double().tolist()], how)
    return [alpha * a + (1 - alpha) * b for a, b in zip(inter, intra, strict=True)]


def visionzip(
    x: Tensor, cls: Tensor, attention: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, list[int]]:
    """Rows [CLS, dominant patches, contextual tokens], and the patch that each stands for (-1: CLS)."""
    x, keys = x.double(), keys.double().tolist()
    chosen = best(attention.double().tolist(), dominant - 1)
    rest = [i for i in range(len(x)) if i not in chosen]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[j * step] for j in range(contextual)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if targets and i not in joined:
            joined[max(targets, key=lambda t: (cosine(keys[i], keys[t]), -t))].append(i)
    rows = [cls.double(), *(x[i] for i in chosen)]
    for target, members in joined.items():
        rows.append(x[target] + (sum(x[i] for i in members) / len(members) if members else 0))
    return torch.stack(rows), [-1, *chosen, *targets]


@dataclass
class VPrune:
    """Redundancy of the patches of one image; the defaults are the documented ones."""

    chi2_threshold: float = 5
    cosine_threshold: float = 0.95
    group: int = 2
    bins: int = 8
    color_space: str = "rgb"
    combine: str = "and"
    chi2_form: str = "symmetric"
    vector: str = "pixels"
    survivor: str = "first"

    def kept(self, pixels: Tensor, grid: tuple[int, int], present: Sequence[int] | None = None) -> list[int]:
        """Raster positions that survive, of pixels [N, 3, p, p] of the whole grid."""
        kept = []
        for u in range(0, grid[0], self.group):
            for v in range(0, grid[1], self.group):
                rows, columns = range(u, min(u + self.group, grid[0])), range(v, min(v + self.group, grid[1]))
                members = [r * grid[1] + c for r in rows for c in columns]
                kept += self.survivors([i for i in members if present is None or i in present], pixels)
        return sorted(kept)

    def survivors(self, members: list[int], pixels: Tensor) -> list[int]:
        if self.survivor == "all":
            first, *_ = members or [None]
            others = {i: [j for j in members if j != i] for i in members}
            return [i for i in members if i == first or not all(self.redundant(pixels, i, j) for j in others[i])]
        if self.survivor == "variance":
            members = sorted(members, key=lambda i: (-spread(pixels[i].flatten().tolist()), i))
        kept: list[int] = []
        for j in members:
            if not any(self.redundant(pixels, i, j) for i in kept):
                kept.append(j)
        return kept

    def redundant(self, pixels: Tensor, i: int, j: int) -> bool:
        """Whether j repeats the earlier i."""
        a, b = pixels[i], pixels[j]
        if a.equal(b):
            return True
        if self.color_space == "hsv":
            a, b = hsv(a), hsv(b)
        close = self.chi2(self.histogram(a), self.histogram(b)) <= self.chi2_threshold
        alike = cosine(self.colours(a), self.colours(b)) >= self.cosine_threshold
        return {"and": close and alike, "or": close or alike, "chi2": close, "cosine": alike}[self.combine]

    def histogram(self, patch: Tensor) -> list[int]:
        counts = [0] * (3 * self.bins)
        for channel, values in enumerate(patch.flatten(1).tolist()):
            for value in values:
                counts[channel * self.bins + value * self.bins // 256] += 1
        return counts

    def chi2(self, h: list[int], g: list[int]) -> float:
        total = 0.0
        for a, b in zip(h, g, strict=True):
            below = a + b if self.chi2_form == "symmetric" else a
            total += (a - b) ** 2 / below if below else 0
        return total

    def colours(self, patch: Tensor) -> list[float]:
        flat = patch.double().flatten(1)
        mean = flat.mean(1, keepdim=True)
        return {"pixels": flat, "mean": mean, "centered": flat - mean}[self.vector].flatten().tolist()


def hsv(patch: Tensor) -> Tensor:
    """[3, p, p] -> the same, hue, saturation and value stretched to 0 ... 255."""
    pixels = [colorsys.rgb_to_hsv(*(v / 255 for v in rgb)) for rgb in patch.flatten(1).T.tolist()]
    return torch.tensor([[round(255 * v) for v in pixel] for pixel in pixels], dtype=torch.uint8).T.view(patch.shape)


def spread(values: list[int]) -> int:
    """The variance times n^2, exactly."""
    return len(values) * sum(v * v for v in values) - sum(values) ** 2


def patches(image: Tensor) -> Tensor:
    """[3, H, W] uint8 -> [N, 3, p, p] in raster order."""
    rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
    places = [(r * PATCH, c * PATCH) for r in range(rows) for c in range(columns)]
    return torch.stack([image[:, y : y + PATCH, x : x + PATCH] for y, x in places])


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    output: Tensor  # [1 + N, D]
    attention: Tensor  # [H, 1 + N, 1 + N]
    keys: Tensor  # [H, 1 + N, d]


def attend(q: Tensor, k: Tensor, v: Tensor, factor: float, visible: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v [H, L, d], visible [L, L] bool -> values [L, H d] and weights [H, L, L]."""
    weights = (q @ k.transpose(1, 2) * factor).masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights


def split(x: Tensor, heads: int) -> Tensor:
    """[L, H d] -> [H, L, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def clip_tower(tower: nn.Module, pixels: Tensor, kept: Sequence[int]) -> list[Block]:
    """All blocks of a CLIP tower over the full length, nobody attending to the patches that are not kept."""
    inner = getattr(tower, "vision_model", tower)
    h = inner.pre_layrnorm(inner.embeddings(pixels[None])[0])
    visible = torch.zeros(len(h), len(h), dtype=torch.bool)
    visible[:, [0, *(i + 1 for i in kept)]] = True
    blocks = []
    for block in inner.encoder.layers:
        u, a = block.layer_norm1(h), block.self_attn
        heads = inner.config.num_attention_heads
        q, k, v = (split(p(u), heads) for p in (a.q_proj, a.k_proj, a.v_proj))
        mixed, weights = attend(q, k, v, q.shape[-1] ** -0.5, visible)
        h = h + a.out_proj(mixed)
        h = h + block.mlp(block.layer_norm2(h))
        blocks.append(Block(h, weights, k))
    return blocks


def merging_tower(
    tower: nn.Module, pixels: Tensor, left: Sequence[int], counts: Sequence[int], proportional: bool = True
) -> tuple[list[Block], list[int]]:
    """All blocks of a CLIP tower that merges to counts[l] patches inside block l; first patches of the survivors."""
    inner = getattr(tower, "vision_model", tower)
    h = inner.pre_layrnorm(inner.embeddings(pixels[None])[0])[[0, *(i + 1 for i in left)]]
    groups, blocks, heads = [[-1], *([i] for i in left)], [], inner.config.num_attention_heads
    for number, block in enumerate(inner.encoder.layers):
        u, a = block.layer_norm1(h), block.self_attn
        q, k, v = (split(p(u), heads) for p in (a.q_proj, a.k_proj, a.v_proj))
        bias = torch.tensor([math.log(len(group)) if proportional else 0.0 for group in groups])
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        h = h + a.out_proj((weights @ v).transpose(0, 1).flatten(1))
        if number < len(counts):
            h, groups = merge_step(h, k.mean(0), groups, counts[number])
            if number + 1 == len(counts):
                order = sorted(range(len(groups)), key=lambda i: min(groups[i]))
                h, groups = h[order], [groups[i] for i in order]
        h = h + block.mlp(block.layer_norm2(h))
        blocks.append(Block(h, weights, k))
    return blocks, [min(group) for group in groups[1:]]


def merge_step(
    h: Tensor, keys: Tensor, groups: list[list[int]], count: int, protected: int = 1
) -> tuple[Tensor, list[list[int]]]:
    """ToMe's bipartite matching down to `count` tokens beside the protected first ones; h [L, D], keys [L, d]."""
    a, b = list(range(0, len(h), 2)), list(range(1, len(h), 2))
    rows = keys.double().tolist()
    alike = {i: max((cosine(rows[i], rows[j]), -j) for j in b) for i in a if i >= protected} if b else {}
    ranked = sorted(alike, key=lambda i: (-alike[i][0], i))[: len(h) - protected - count]
    joined = {j: [i for i in ranked if -alike[i][1] == j] for j in b}
    new, kept = [], []
    for i in [*(i for i in a if i not in ranked), *b]:
        members = [i, *joined.get(i, [])]
        total = sum(len(groups[m]) for m in members)
        new.append(sum(h[m].double() * len(groups[m]) for m in members) / total)
        kept.append([patch for m in members for patch in groups[m]])
    return torch.stack(new).to(h.dtype), kept


def llama(
    tiny: Tiny, x: Tensor, hidden: dict[int, list[int]], positions: Sequence[int] = (), anew: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Logits [L, V] and attentions [H, L, L] per layer of embeddings [L, D] without a cache.

    From layer K on nobody attends to the columns `hidden[K]`. `positions` are those of the first columns, the others
    follow; with `anew` every layer that hides columns counts those that are left from 0, and so do later layers.
    """
    decoder, config = tiny.decoder, tiny.decoder.config
    places = [*positions, *range(len(x) - len(positions))]
    places[len(positions) :] = [max(positions, default=-1) + 1 + i for i in places[len(positions) :]]
    visible, attentions, h, gone = torch.ones(len(x), len(x), dtype=torch.bool).tril(), [], x, set()
    for number, layer in enumerate(decoder.layers):
        for column in hidden.get(number, []):
            visible[:column, column] = visible[column + 1 :, column] = False
            gone.add(column)
        if anew and number in hidden:
            left = [column for column in range(len(x)) if column not in gone]
            places = [left.index(column) if column in left else 0 for column in range(len(x))]
        angles = torch.tensor(places)[:, None] * decoder.rotary_emb.inv_freq.double()[None]
        cos, sin = (torch.cat([t, t], dim=-1).float() for t in (angles.cos(), angles.sin()))
        u, a = layer.input_layernorm(h), layer.self_attn
        q = split(a.q_proj(u), config.num_attention_heads)
        k, v = (split(p(u), config.num_key_value_heads) for p in (a.k_proj, a.v_proj))
        q, k = (
            t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k)
        )
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        mixed, weights = attend(q, k, v, q.shape[-1] ** -0.5, visible)
        h = h + a.o_proj(mixed)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        attentions.append(weights)
    return tiny.model.lm_head(decoder.norm(h)), attentions


# -- the whole way of one prompt --------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What should happen to one prompt."""

    kept: dict[str, list[list[int]]] = field(default_factory=dict)  # by strategy, per image: raster positions, -1: CLS
    length: int = 0  # columns of the shortened prompt
    text: list[int] = field(default_factory=list)  # those that hold text
    hidden: list[int] = field(default_factory=list)  # those that the last layer does not see
    lengths: list[int] = field(default_factory=list)  # columns that each decoder layer sees
    ids: list[int] = field(default_factory=list)
    logits: Tensor | None = None  # [steps, V]
    prompt: Tensor | None = None  # [length, V]: logits of the whole shortened prompt
    positions: list[int] = field(default_factory=list)  # of the shortened prompt's columns; empty: from 0
    anew: bool = False  # layers that are cut count their columns from 0


Plan = Sequence[tuple[str, dict[str, Any]]]  # (strategy, hyper-parameters), in the order of the stages
ORDER = {"vprune": 0, "tome": 1.5, "l2": 1, "stride": 2, "random": 2, "atp": 2, "visionzip": 3, "fastv": 4}


@torch.no_grad()
def run(
    tiny: Tiny,
    row: Sequence[Any],
    plan: Plan,
    drawn: Sequence[Sequence[int]] = (),
    answer: Sequence[int] = (-1,) * NEW,
    positions: str = "",
) -> Expected:
    """The prompt through the model, pruned as planned.

    `drawn`: per image, what `random` keeps. `answer`: the ids that follow the prompt, -1 for the most probable one.
    `positions`: original or compact everywhere; by default compact in the prompt and original between layers.
    """
    expected = Expected(kept={name: [] for name, _ in plan}, anew=positions == "compact")
    whole: list[int] = []  # positions of the columns in the whole prompt
    after = 0
    plan = sorted(plan, key=lambda entry: place(*entry))
    text = words([1, *(part for part in row if not isinstance(part, Tensor))][1:])
    x, spans, index, numbers = [], [], [], iter(drawn)
    for part in row:
        if not isinstance(part, Tensor):
            expected.text.append(sum(map(len, x)))
            x.append(tiny.decoder.embed_tokens(torch.tensor([part])))
            whole, after = [*whole, after], after + 1
            continue
        draw = next(numbers, None)
        rows, left = vision(tiny, part, plan, text, draw, expected)
        start = sum(map(len, x))
        spans.append(list(range(start, start + len(rows))))
        index.append(left)
        x.append(rows)
        whole, after = [*whole, *(after + max(0, i) for i in left)], after + N
    x = torch.cat(x)
    expected.length = len(x)
    expected.positions = whole if positions == "original" else []
    hidden = language(tiny, x, plan, spans, index, drawn, expected)
    expected.hidden = sorted(column for columns in hidden.values() for column in columns)
    for number in range(len(tiny.decoder.layers)):
        expected.lengths.append(len(x) - sum(len(columns) for layer, columns in hidden.items() if layer <= number))
    expected.ids = list(answer) if -1 not in answer else greedy(tiny, x, hidden, len(answer), expected)
    x = torch.cat([x, tiny.decoder.embed_tokens(torch.tensor(expected.ids[:-1], dtype=torch.long))])
    logits, _ = llama(tiny, x, hidden, expected.positions, expected.anew)
    expected.prompt, expected.logits = logits[: expected.length], logits[expected.length - 1 :]
    return expected


def greedy(tiny: Tiny, x: Tensor, hidden: dict[int, list[int]], steps: int, expected: Expected) -> list[int]:
    """The most probable ids, everything computed anew for each."""
    ids: list[int] = []
    for _ in range(steps):
        logits, _ = llama(tiny, x, hidden, expected.positions, expected.anew)
        ids.append(int(logits[-1].argmax()))
        x = torch.cat([x, tiny.decoder.embed_tokens(torch.tensor(ids[-1:]))])
    return ids


def place(name: str, hyper: dict[str, Any]) -> int:
    return {"vit": 1, "projector": 2, "llm": 4}.get(hyper.get("at"), ORDER[name])


def vision(
    tiny: Tiny, image: Tensor, plan: Plan, text: str, drawn: Sequence[int] | None, expected: Expected
) -> tuple[Tensor, list[int]]:
    """Projected rows of one image, and the raster positions that they stand for."""
    pixels = tiny.normalise([image])[0]
    left = list(range(N))
    for name, hyper in plan:
        if place(name, hyper) < 1.5:  # ToMe merges later, inside the blocks
            left = embedded(tiny, image, pixels, left, name, hyper, drawn)
            expected.kept[name].append(left)
    merging = dict(plan).get("tome")
    if merging is None:
        blocks = clip_tower(tiny.tower, pixels, left)
        x = blocks[-2].output[[i + 1 for i in left]]
    else:
        steps, last = (
            len(getattr(tiny.tower, "vision_model", tiny.tower).encoder.layers) - 1,
            floor(merging.get("keep_ratio", 1 / 3) * len(left)),
        )
        counts = [len(left) - round((len(left) - last) * (step + 1) / steps) for step in range(steps)]
        blocks, left = merging_tower(tiny.tower, pixels, left, counts, merging.get("proportional", True))
        x = blocks[-2].output[1:]
        expected.kept["tome"].append(left)
    for name, hyper in plan:
        if place(name, hyper) in (2, 3):
            x, left = projected(tiny, blocks, x, left, name, hyper, text, drawn)
            expected.kept[name].append(left)
    return tiny.projector(x), left


def embedded(
    tiny: Tiny, image: Tensor, pixels: Tensor, left: list[int], name: str, hyper: dict[str, Any], drawn: Any
) -> list[int]:
    """The pixels and vit stages."""
    if name == "vprune":
        return VPrune(**hyper).kept(patches(image), (GRID, GRID), left)
    if name == "l2":
        inner = getattr(tiny.tower, "vision_model", tiny.tower)
        if hyper.get("center"):
            size, values = PATCH, pixels.clone()
            for y in range(0, values.shape[1], size):
                for z in range(0, values.shape[2], size):
                    tile = values[:, y : y + size, z : z + size]
                    tile -= tile.mean((1, 2), keepdim=True)
            pixels = values
        e = inner.embeddings.patch_embedding(pixels[None])[0].flatten(1).T[left]
        if hyper.get("positioned"):
            e = e + inner.embeddings.position_embedding.weight[[i + 1 for i in left]]
        return [left[i] for i in best(l2_scores(e), floor(hyper.get("keep_ratio", 0.5) * len(left)))]
    return thinned(left, name, hyper, drawn)


def thinned(left: list[int], name: str, hyper: dict[str, Any], drawn: Any) -> list[int]:
    """The controls, at any stage."""
    if name == "random":
        return list(drawn)
    k = floor(hyper.get("keep_ratio", 0.5) * len(left))
    return [left[i * len(left) // k] for i in range(k)]


def projected(
    tiny: Tiny, blocks: list[Block], x: Tensor, left: list[int], name: str, hyper: dict[str, Any], text: str, drawn: Any
) -> tuple[Tensor, list[int]]:
    """The projector stage: rows [K, D] and the raster positions of the survivors."""
    rows = [i + 1 for i in left]
    if name == "visionzip":
        block = blocks[-2]
        attention, keys = block.attention[:, 0, rows].mean(0), block.keys[:, rows].mean(0)
        dominant, contextual = hyper["dominant"], hyper["contextual"]
        merged, sources = visionzip(x, block.output[0], attention, keys, dominant, contextual)
        return merged.to(x.dtype), [left[i] if i >= 0 else -1 for i in sources]
    if name == "atp":
        chosen = atp(tiny, blocks[hyper.get("layer", -1)], rows, hyper, text)
    else:
        chosen = [left.index(i) for i in thinned(left, name, hyper, drawn)]
    return x[chosen], [left[i] for i in chosen]


def atp(tiny: Tiny, block: Block, rows: list[int], hyper: dict[str, Any], text: str) -> list[int]:
    clip, tokenizer = clip_model(tiny.clip)
    inner = getattr(tiny.tower, "vision_model", tiny.tower)
    patches = clip.visual_projection(inner.post_layernorm(block.output))[rows]
    ids = tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
    words = clip.text_projection(clip.text_model(**ids).pooler_output)[0]
    alpha = hyper.get("alpha", 0.5)
    attention = block.attention[:, 0, rows].mean(0)
    scores = atp_scores(
        attention, patches, words, alpha, hyper.get("relevance_sign", 1), hyper.get("normalization", "minmax")
    )
    return best(scores, nearest(hyper.get("keep_ratio", 0.6) * len(rows)))


@cache
def clip_model(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPModel

    return CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def language(
    tiny: Tiny,
    x: Tensor,
    plan: Plan,
    spans: list[list[int]],
    index: list[list[int]],
    drawn: Sequence[Sequence[int]],
    expected: Expected,
) -> dict[int, list[int]]:
    """The llm stage: the columns that nobody sees from each cut layer on."""
    hidden: dict[int, list[int]] = {}
    for name, hyper in plan:
        if place(name, hyper) != 4:
            continue
        layer = hyper.get("layer", 2)
        _, attentions = llama(tiny, x, hidden, expected.positions, expected.anew)
        last = attentions[layer - 1][:, -1].mean(0)
        for number, span in enumerate(spans):
            if name == "fastv":
                kept = best(last[span].tolist(), nearest(hyper.get("keep_ratio", 0.5) * len(span)))
            else:
                kept = [
                    index[number].index(i)
                    for i in thinned(index[number], name, hyper, drawn[number] if drawn else None)
                ]
            hidden.setdefault(layer, []).extend(c for i, c in enumerate(span) if i not in kept)
            index[number] = [index[number][i] for i in kept]
            spans[number] = [span[i] for i in kept]
            expected.kept[name].append(index[number])
    return hidden
