"""Draw which patches of a picture survive and where others merged, one panel per strategy, with the model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import config, files
from vtp_plugin.reporting.pictures import open_picture
from vtp_plugin.reporting.terminal import console


def command(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    pruning: Annotated[str, typer.Option(help="Strategies, separated by commas; a+b composes.")] = "atp",
    pruning_args: Annotated[str, typer.Option(help="key=value,... for a single strategy.")] = "",
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("kept.png"),
    model: Annotated[str, typer.Option(help="vtp-tiny, or a checkpoint in transformers' format.")] = "vtp-tiny",
    target: Annotated[str | None, typer.Option(help="The right answer: marks the answers as right or wrong.")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Add a row of what the strategies ranked by.")] = False,
) -> None:
    files.check_output(output, kinds=(".png", ".pdf", ".svg", ".jpg", ".jpeg"), read=[image])
    specs = config.parse_names(pruning, "--pruning")
    arguments = config.parse_pairs(pruning_args)
    strategies = {spec: config.resolve(spec, arguments) for spec in specs}
    picture = open_picture(image)
    from vtp_plugin.reporting.figures import drawn, kept_figure
    from vtp_plugin.reporting.views import view
    from vtp_plugin.tiny.inference import load

    loaded = load(model, [one for chosen in strategies.values() for one in chosen])
    views = [view(*loaded, picture, question, s, label, target=target) for label, s in strategies.items()]
    files.write(output, drawn(kept_figure([views], scores=scores), output.suffix))
    for seen in views:
        console().print(f"{seen.summary}\nanswer: {seen.answer}")
    console().print(f"written: {output}")
