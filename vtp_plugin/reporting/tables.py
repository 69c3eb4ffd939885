"""One table, four ways to print it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich import table as rich_table


@dataclass
class Table:
    """Column names and rows of text."""

    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    title: str = ""
    caption: str = ""

    def add(self, *cells: object) -> None:
        self.rows.append(tuple(str(cell) for cell in cells))

    def rich(self) -> rich_table.Table:
        """For a terminal."""
        table = rich_table.Table(
            title=self.title or None,
            caption=self.caption or None,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
            show_edge=False,
            pad_edge=False,
        )
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if self._numeric(number) else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a README."""
        rule = ["---:" if self._numeric(number) else "---" for number in range(len(self.columns))]
        lines = [list(self.columns), rule, *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join(filter(None, [self.title and f"**{self.title}**", body, self.caption]))

    def csv(self) -> str:
        """For a spreadsheet."""
        text = io.StringIO()
        csv.writer(text).writerows([self.columns, *self.rows])
        return text.getvalue()

    def latex(self) -> str:
        """For a paper; needs the package booktabs."""
        align = "".join("r" if self._numeric(number) else "l" for number in range(len(self.columns)))
        lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (self.columns, *self.rows)]
        body = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        said = [f"% {text}" for text in (self.title, self.caption) if text]
        return "\n".join([*said, *body, r"\end{tabular}", ""])

    def _numeric(self, number: int) -> bool:
        cells = [row[number].rstrip(" %x*").split(" ")[0] for row in self.rows if row[number] not in ("", "-")]
        return bool(cells) and all(_is_number(cell) for cell in cells)


def _escaped(text: str) -> str:
    """Text as TeX prints it."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text).replace("<", "$<$").replace(">", "$>$")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
