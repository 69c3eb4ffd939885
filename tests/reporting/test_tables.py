"""One table printed for a terminal, a README, a spreadsheet and a paper."""

from __future__ import annotations

import csv
import io
import re

import pytest
from rich.console import Console

from vtp_plugin.reporting.tables import Table

AWKWARD = r"a_b & 50% of {x} #1 $2 \ ~ ^ → ± < >"


def table() -> Table:
    made = Table(["strategy", "accuracy_1"], title="T & U", caption="read 100%")
    made.add(AWKWARD, "61.5")
    return made


def unescaped(text: str) -> str:
    """What LaTeX would print: the escapes read back one by one."""
    words = {"textbackslash{}": "\\", "textasciitilde{}": "~", "textasciicircum{}": "^"}
    text = text.replace(r"$\rightarrow$", "→").replace(r"$\pm$", "±").replace("$<$", "<").replace("$>$", ">")
    return re.sub(
        r"\\(textbackslash\{\}|textasciitilde\{\}|textasciicircum\{\}|.)", lambda m: words.get(m[1], m[1]), text
    )


def test_latex_says_what_the_table_says() -> None:
    lines = table().latex().splitlines()
    row = next(line for line in lines if "61.5" in line)
    assert row.endswith(r" & 61.5 \\")
    assert unescaped(row.removesuffix(r" & 61.5 \\")) == AWKWARD
    assert r"\begin{tabular}{lr}" in lines
    assert r"\caption{T \& U. read 100\%}" in lines


def test_no_special_letter_of_latex_is_left_bare() -> None:
    row = next(line for line in table().latex().splitlines() if "61.5" in line)
    cell = re.sub(r"\$(\\rightarrow|\\pm|<|>)\$", "", row.removesuffix(r" & 61.5 \\"))
    assert not re.search(r"(?<!\\)[&%$#_]", cell)


def test_csv_reads_back() -> None:
    assert list(csv.reader(io.StringIO(table().csv()))) == [["strategy", "accuracy_1"], [AWKWARD, "61.5"]]


def printed(made: Table, width: int) -> str:
    text = io.StringIO()
    made.show(Console(file=text, width=width, markup=True))
    return text.getvalue()


WIDE = Table(
    ["name", *(f"column{number}" for number in range(12)), "link"], title="[bold]a title", findings=["[/red] odd"]
)
WIDE.add(
    "atp [/x]",
    *(f"{number}.5 [-{number}, +{number}]" for number in range(12)),
    "see https://example.org/a/page :smile:",
)


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_terminal_of_any_width_shows_every_cell_whole(width: int) -> None:
    shown = printed(WIDE, width)
    assert all(len(line) <= width for line in shown.splitlines())
    for cell in [
        *WIDE.columns,
        *WIDE.rows[0][:-1],
        "https://example.org/a/page",
        ":smile:",
        WIDE.title,
        *WIDE.findings,
    ]:
        assert cell in shown
    assert shown.count("atp [/x]") == len(WIDE.fitted(width))
    assert (len(WIDE.fitted(width)) > 1) == (width < 200)


def test_a_short_table_is_one_table() -> None:
    made = table()
    assert made.fitted(80) == [[0, 1]]
    assert "read 100%" not in printed(made, 80)  # what columns mean is for files
