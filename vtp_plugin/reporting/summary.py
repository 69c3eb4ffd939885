"""A run in one line: what was cut, what that saves, and where the proof is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def line(strategies: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], record: str = "") -> str:
    """`atp 0.6: 144 -> 86 visual tokens per image, prefill FLOPs 0.79x, KV 0.70x, selector 1.2 ms, 5 of 5 samples ...`

    `strategies`: their configurations, as in a record. `entry`: a run's record or the same keys of it; what it has not,
    the line leaves out. `record`: where the record is.
    """
    samples = entry["samples"]
    if not samples["with_images"]:
        said = [f"{samples['total']} samples, none with an image"]
    else:
        pruned = f"{samples['pruned']} of {samples['with_images']} samples pruned" if strategies else ""
        said = [_tokens(entry, bool(strategies)), *_costs(entry, bool(strategies)), pruned]
    text = f"{name(strategies)}: {', '.join(filter(None, said))}"
    return f"{text}; record: {record}" if record else text


def show(entry: Mapping[str, Any], options: Any) -> None:
    """Print the line of a run's record. `options`: the host's command line, which says where the record will be."""
    folder = getattr(options, "output_path", None)
    kept = f"{str(folder).rstrip('/')}/" if folder else "not kept (say --output_path FOLDER)"
    print(line(entry["strategies"], entry, kept), flush=True)


def name(strategies: Sequence[Mapping[str, Any]]) -> str:
    """`atp 0.6`, `visionzip 64 + fastv 0.5`, `vprune`; `unpruned` for none."""
    return " + ".join(map(_one, strategies)) or "unpruned"


def _one(strategy: Mapping[str, Any]) -> str:
    settings = strategy.get("config", {})
    budget = settings.get("keep_ratio") or settings.get("keep_tokens")
    return f"{strategy['name']} {budget:g}" if isinstance(budget, (int, float)) else strategy["name"]


def _tokens(entry: Mapping[str, Any], pruned: bool) -> str:
    before, after = (entry["visual_tokens"].get(f"mean_{when}", 0.0) for when in ("before", "after"))
    counts = f"{before:.0f} -> {after:.0f}" if pruned else f"{after:.0f}"
    return f"{counts} visual tokens per image"


def _costs(entry: Mapping[str, Any], pruned: bool) -> list[str]:
    if not pruned:
        return []
    parts = {"prefill FLOPs": "prefill_flops", "KV": "kv_cache_bytes", "prompts": "prompt_tokens"}
    said = [f"{label} {_ratio(entry[key])}" for label, key in parts.items() if entry.get(key, {}).get("before")]
    if "seconds" in entry:
        said.append(f"selector {1e3 * entry['seconds']['selector'] / max(1, entry['samples']['total']):.1f} ms")
    return said


def _ratio(counts: Mapping[str, float]) -> str:
    return f"{counts['after'] / counts['before']:.2f}x"
