"""Fill the generated parts of README.md: `python -m vtp_plugin.reporting.readme`. Nothing there is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

README = Path("README.md")
DEMO_TABLE = Path("docs/results/demo/table.md")


def parts() -> dict[str, Callable[[], str]]:
    """The generated blocks by name."""
    from vtp_plugin.cli.list import catalogue, families

    return {
        "strategies": lambda: catalogue().markdown(),
        "models": lambda: families().markdown(),
        "demo": lambda: DEMO_TABLE.read_text().strip(),
    }


def filled(text: str) -> str:
    """The text with every block between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, make in parts().items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = block.sub(lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}", text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
