"""One table, four ways to print it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

UNBROKEN = 26  # letters of a cell that stands in one line
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
    caption: str = ""  # what the columns mean, for files
    findings: Sequence[str] = ()  # short lines for a terminal; files have them in the caption
    keys: int = 1  # columns that name a row
    notes: list[str] = field(default_factory=list)  # long texts that several cells share, numbered from 1

    def add(self, *cells: object) -> None:
        self.rows.append(tuple(str(cell) for cell in cells))

    def noted(self, short: str, note: str) -> str:
        """A cell that says something short and the number of a note below the table."""
        if note not in self.notes:
            self.notes.append(note)
        return f"{short} [{self.notes.index(note) + 1}]"

    def _footnotes(self) -> list[str]:
        return [f"[{number}] {note}" for number, note in enumerate(self.notes, 1)]

    def rich(self, columns: Sequence[int] | None = None, width: int | None = None) -> rich_table.Table:
        """For a terminal: all columns, or those of these numbers; as wide as their text, or at most `width`."""
        table = rich_table.Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
        chosen = list(range(len(self.columns))) if columns is None else list(columns)
        for number, letters in zip(chosen, self._widths(chosen, width), strict=True):
            side = "right" if self._numeric(number) else "left"
            table.add_column(Text(self.columns[number]), justify=side, width=letters, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(row[number]) for number in chosen))
        return table

    def _widths(self, columns: Sequence[int], width: int | None) -> list[int]:
        """Letters per column: what each needs, and of what is left as much as its text has, the same for all."""
        widths, whole = [self._needed(number) for number in columns], [self._whole(number) for number in columns]
        left = math.inf if width is None else width - sum(widths) - len(widths) + 1
        while left > 0 and (growing := [n for n, letters in enumerate(widths) if letters < whole[n]]):
            for number in growing[: int(min(left, len(growing)))]:
                widths[number] += 1
                left -= 1
        return widths

    def show(self, console: Console) -> None:
        """On a terminal of any width: what was found, then the columns in as many tables as the width asks for."""
        if self.title:
            console.print(Text(self.title, "bold"), soft_wrap=False)
        for finding in self.findings:
            console.print(Text(finding), soft_wrap=False)
        for number, columns in enumerate(self.fitted(console.width)):
            if number:
                console.print()
            console.print(self.rich(columns, console.width), soft_wrap=False)
        for line in self._footnotes():
            console.print(Text(line), soft_wrap=False)

    def fitted(self, width: int) -> list[list[int]]:
        """The numbers of the columns of one table or more that are no wider; each begins with the key columns."""
        keys = list(range(min(self.keys, len(self.columns))))
        blocks = [[*keys]]
        for number in range(len(keys), len(self.columns)):
            asked = [self._needed(column) for column in [*blocks[-1], number]]
            if sum(asked) + len(asked) - 1 > width and len(blocks[-1]) > len(keys):
                blocks.append([*keys])
            blocks[-1].append(number)
        return blocks

    def _whole(self, number: int) -> int:
        """Letters of the longest text of a column."""
        return max(cell_len(text) for text in [self.columns[number], *(row[number] for row in self.rows)])

    def _needed(self, number: int) -> int:
        """Letters that a column takes at least: short cells are not broken, long ones between words only."""
        cells = [row[number] for row in self.rows]
        broken = max(map(len, cells), default=0) > UNBROKEN
        parts = [part for cell in cells for part in (cell.split() if broken else [cell])]
        return max((cell_len(part) for part in [*self.columns[number].split(), *parts]), default=1)

    def markdown(self) -> str:
        """For a README."""
        rule = ["---:" if self._numeric(number) else "---" for number in range(len(self.columns))]
        lines = [list(self.columns), rule, *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        notes = "  \n".join(self._footnotes())
        return "\n\n".join(filter(None, [self.title and f"**{self.title}**", body, notes, self.caption]))

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
        said = latex_escaped(". ".join(filter(None, [self.title, self.caption, *self._footnotes()])))
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
