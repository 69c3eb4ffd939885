"""docs/modes.md, the table of what is handed in and got back by column: every row, at every stage, right or refused."""

from __future__ import annotations

import forward_rows
import generate_rows
import pytest
import torch
from models import tiny
from paths import ROOT

CASES = {"none": {}, "l2": {}, "stride": {"positions": "original"}, "fastv": {}, "pyramiddrop": {}}
ROWS = forward_rows.ROWS | generate_rows.ROWS
TABLE = (ROOT / "docs" / "modes.md").read_text().split("## By column")[1].split("\n\n")[2]


def rows_of_the_table() -> list[str]:
    return [line.strip("|").split("|")[0].strip() for line in TABLE.splitlines()[2:]]


def test_every_row_of_the_table_is_tested():
    assert rows_of_the_table() == list(ROWS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", rows_of_the_table())
@torch.no_grad()
def test_a_row(name: str, case: str):
    host = tiny("llava_hf")
    with host.prune(case, **CASES[case]):
        ROWS[name](host, case)
