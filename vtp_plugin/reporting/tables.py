"""One table, four ways to print it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich import table as rich_table
from rich.console import Console

LATEX = {  # what a letter of text is called in LaTeX
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u2192": r"$\rightarrow$",
    "\u00b1": r"$\pm$",
    "<": "$<$",
    ">": "$>$",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
}


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

    def show(self, console: Console) -> None:
        """On a terminal as it fits there, in a log as Markdown, whole."""
        console.print(self.rich() if console.is_terminal else self.markdown(), soft_wrap=not console.is_terminal)

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
        columns = "".join("r" if self._numeric(number) else "l" for number in range(len(self.columns)))
        head, *body = (" & ".join(map(latex_escaped, line)) + r" \\" for line in [self.columns, *self.rows])
        inner = [r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        tabular = [rf"\begin{{tabular}}{{{columns}}}", *inner, r"\end{tabular}"]
        said = latex_escaped(". ".join(filter(None, [self.title, self.caption])))
        caption = [rf"\caption{{{said}}}"] if said else []
        lines = [r"\begin{table}", r"\centering", *caption, *tabular, r"\end{table}"]
        return "% needs \\usepackage{booktabs}\n" + "\n".join(lines) + "\n"

    def _numeric(self, number: int) -> bool:
        cells = [row[number].rstrip(" %x*").split(" ")[0] for row in self.rows if row[number] not in ("", "-")]
        return bool(cells) and all(_is_number(cell) for cell in cells)


def latex_escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
