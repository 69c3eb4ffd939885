"""Check a model family's promises on a small model of it: bits, budgets, batches, a slow reference, nothing left."""

from __future__ import annotations

from typing import Annotated

import typer

from vtp_plugin.cli.check import verdict


def command(
    builder: Annotated[str, typer.Argument(help="module:builder or file.py:builder, which makes a promises.Case.")],
) -> None:
    from vtp_plugin.promises import case, promises  # with the model's own package

    verdict(builder, promises(case.load(builder)))
