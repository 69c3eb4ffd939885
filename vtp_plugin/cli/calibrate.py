"""Free numbers from pictures: V-PRUNE's threshold for a share of the patches, FitPrune's schedule for a model.

V-PRUNE's pictures are prepared as a model's own image processor prepares them (`--processor`): padded, cropped, cut
into tiles, or in their own size.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.progress import track

from vtp_plugin import files
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.pictures import SUFFIXES, open_picture
from vtp_plugin.reporting.terminal import console


class Method(str, Enum):
    """Strategies whose numbers follow from data."""

    vprune = "vprune"
    fitprune = "fitprune"


def command(
    method: Annotated[Method, typer.Argument(help="The strategy.")],
    images: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures.")],
    target: Annotated[
        float | None, typer.Option(help="vprune, required: share of the patches to remove, e.g. 0.22.")
    ] = None,
    pruning_args: Annotated[str, typer.Option(help="Other parameters, e.g. chi2_threshold=10,color_space=hsv.")] = "",
    processor: Annotated[
        str,
        typer.Option(
            help="vprune: who prepares the pictures: llava-1.5 (pads), llava-1.5-hf (crops), clip-224, llava-1.6, "
            "llava-onevision, qwen2.5-vl, qwen3-vl, vtp-tiny, or a checkpoint's folder."
        ),
    ] = "llava-1.5",
    size: Annotated[
        int | None, typer.Option(help="Side of the prepared picture in pixels, where the processor makes one square.")
    ] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a patch in pixels, likewise.")] = None,
    model: Annotated[str, typer.Option(help="fitprune: a LLaVA in transformers' format.")] = "vtp-tiny",
    question: Annotated[str, typer.Option(help="fitprune: what to ask about each picture.")] = "Describe the image.",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the result (vprune YAML, fitprune JSON) here.")
    ] = None,
) -> None:
    if output is not None:
        files.check_output(output, read=[images])
    if method is Method.fitprune:
        if target is not None:
            raise PruningError("--target is for vprune; fitprune's file holds schedules for every keep_ratio")
        text = _schedules(_pictures(images), model, question)
    elif target is None:
        raise PruningError("vprune needs --target, the share of the patches to remove")
    else:
        text = _threshold(method.value, images, target, pruning_args, processor, size, patch)
    if output is not None:
        files.write(output, text)
    console().print(text, end="")


def _schedules(paths: list[Path], model_name: str, question: str) -> str:
    """FitPrune's file, JSON: the share of the tokens that each layer sees, for nine targets."""
    from functools import partial

    from vtp_plugin.compare.calibration import recorded
    from vtp_plugin.strategies.fitprune import FitPrune, fitted
    from vtp_plugin.tiny.inference import answer, load

    pictures = [open_picture(path) for path in paths]
    model, processor = load(model_name)
    calls = [partial(answer, model, processor, picture, question) for picture in pictures]
    seen = recorded(model, processor, FitPrune.needs, track(calls, "reading", transient=True))
    samples = [[(s.self_attention[0], s.cross_attention[0]) for s in layers] for layers in seen]
    rows = [fitted(samples, step / 10) for step in track(range(1, 10), "fitting", transient=True)]
    left = [[round(share, 5) for share in row] for row in rows]
    settings = {"model": model_name, "pictures": len(paths), "question": question, "left": left}
    return json.dumps(settings) + "\n"


def _threshold(
    method: str, images: Path, target: float, pruning_args: str, processor: str, size: int | None, patch: int | None
) -> str:
    """V-PRUNE's setting with the threshold found."""
    if not 0 < target < 1:
        raise PruningError(f"--target must be a share between 0 and 1, got {target}")
    from vtp_plugin.compare.calibration import calibrate
    from vtp_plugin.config import parse_pairs
    from vtp_plugin.hosts.transformers.preparing import prepared

    fields, paths, prepare = parse_pairs(pruning_args), _pictures(images), prepared(processor, size, patch)
    seen = [prepare(path) for path in track(paths, "reading", transient=True)]
    found = calibrate(method, "cosine_threshold", fields, seen, target)
    if found.remark:
        console(stderr=True).print(found.remark)
    setting = yaml.safe_dump({"strategy": method, **found.strategy.config()}, sort_keys=False)
    said = f"removes {found.share:.1%} of the patches of {len(paths)} pictures, prepared as {processor}"
    return f"# {said} (asked: {target:.1%})\n" + setting


def _pictures(path: Path) -> list[Path]:
    if not path.exists():
        raise PruningError(f"not found: {path}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise PruningError(f"no pictures ({', '.join(sorted(SUFFIXES))}) in {path}")
    return found
