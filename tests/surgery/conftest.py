"""Both layouts of LLaVA, with both attention kernels."""

from __future__ import annotations

import pytest
from models import FAMILIES, Tiny, tiny


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    if request.param == "llava":
        pytest.importorskip("llava")
    return request.param


@pytest.fixture(params=["eager", "sdpa"])
def host(request, family: str) -> Tiny:
    return tiny(family, request.param)


@pytest.fixture
def sdpa(family: str) -> Tiny:
    return tiny(family, "sdpa")
