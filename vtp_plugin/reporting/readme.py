"""Fill the generated parts of README.md and docs: `python -m vtp_plugin.reporting.readme`. No number typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

PAGES = (Path("README.md"), Path("docs/studies.md"))
RESULTS = Path("docs/results")
STUDIES = RESULTS / "studies"
LEADERBOARD = RESULTS / "leaderboard.html"
DEMO_TABLE = Path("docs/results/demo/table.md")
BENCH_TABLE = Path("docs/results/bench_cpu.md")


def parts() -> dict[str, Callable[[], str]]:
    """The generated blocks by name."""
    from vtp_plugin.cli.list import catalogue, families

    return {
        "strategies": lambda: catalogue().markdown(),
        "models": lambda: families().markdown(),
        "demo": DEMO_TABLE.read_text,
        **({"bench": BENCH_TABLE.read_text} if BENCH_TABLE.exists() else {}),
        **{f"study {path.parent.name}": path.read_text for path in sorted(STUDIES.glob("*/table.md"))},
    }


def board() -> str:
    """The page of all committed records."""
    from vtp_plugin.reporting import leaderboard

    return leaderboard.page(leaderboard.entries([RESULTS]), LEADERBOARD)


def filled(text: str) -> str:
    """The text with every block between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, make in parts().items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = block.sub(lambda match, make=make: f"{match[1]}\n{make().strip()}\n\n{match[2]}", text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    LEADERBOARD.write_text(board())
