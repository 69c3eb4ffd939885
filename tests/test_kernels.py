"""Kernels of Triton, by its interpreter on the host, against what they replace; and when they do replace it.

Triton reads its variable when it is imported, so the interpreter has a process of its own, one for all cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtp_plugin
from vtp_plugin import fused, selectors

FUSED = ("farthest_points", "herding", "coverage_at_once", "smallest")
INTERPRETED = """
import sys, torch
from vtp_plugin import kernels
kernels.LOAD = 2**14  # so that few values are several turns of several programs
calls = torch.load(sys.argv[1])
torch.save([getattr(kernels, name)(*given) for name, *given in calls], sys.argv[2])
"""


def cases() -> Iterator[tuple[Any, ...]]:
    """Names and arguments: images with ties, one token, more rows than a tile has, all picks; long rows of values."""
    draw = torch.Generator().manual_seed(0)
    for n, k in ((1, 1), (5, 5), (37, 24), (66, 3)):
        x = torch.randn(2, n, 6, generator=draw)
        x[1] = x[1, torch.arange(n) % 5 % n]
        apart, alike = selectors.distances(x), selectors.gaussian(x, 0.5)
        weight = torch.rand(2, n, generator=draw).sub_(0.1)
        first = torch.stack([torch.randperm(n, generator=draw)[: k - k // 4] for _ in x])
        yield "farthest_points", apart, k
        yield "farthest_points", torch.cat([apart, -apart], 2)[..., :n], k, weight
        yield "herding", alike, first, k
        yield "herding", alike, first[:, :1], k
        yield "coverage_at_once", alike, torch.ones(2, n), k
        yield "coverage_at_once", alike, weight, k
    nothing = torch.full((2, 7, 7), float("nan"))
    yield "farthest_points", nothing, 5
    yield "herding", nothing, torch.tensor([[3], [0]]), 5
    yield "coverage_at_once", nothing, torch.ones(2, 7), 5
    for size in (1, 900, 9000):
        values = torch.rand(2, size, generator=draw) * 10.0 ** torch.randint(-9, 9, (2, 1), generator=draw)
        values[:, ::3] = values[:, :1].clone()
        values[:, 5::7], values[1, 2::5] = 0, float("inf")
        for k in {0, (size - 1) // 2, size * 2 // 3, size - 1} if size > 900 else {size // 2}:
            yield "smallest", values, k


def test_the_interpreted_kernels_find_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("triton", "3.8", reason="no Triton whose interpreter knows NumPy 2.4")
    given, found = tmp_path / "given.pt", tmp_path / "found.pt"
    calls = list(cases())
    torch.save(calls, given)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED, given, found], env=environment, check=True)
    for (name, *arguments), answer in zip(calls, torch.load(found), strict=True):
        expected = unwrap(getattr(selectors, name))(*arguments)
        assert answer.dtype == expected.dtype
        assert answer.equal(expected), (name, [a.shape if isinstance(a, Tensor) else a for a in arguments])


@pytest.fixture
def possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device where no kernel has failed yet."""
    monkeypatch.setattr(fused, "failed", [])
    monkeypatch.setattr(fused, "undisturbed", lambda tensors: True)


def instead(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """This module in the place of `kernels`; None: one that cannot be imported."""
    monkeypatch.delattr(vtp_plugin, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "vtp_plugin.kernels", module)


@pytest.mark.parametrize("name", FUSED)
def test_a_kernel_of_that_name_replaces_a_selection(name: str, monkeypatch: pytest.MonkeyPatch, possible: None) -> None:
    instead(monkeypatch, SimpleNamespace(**{name: lambda *given, **named: (given, named)}))
    x = torch.rand(1, 3, 3)
    (given, named) = getattr(selectors, name)(x, x, k=2)
    assert [one is x for one in given] == [True, True]
    assert named == {"k": 2}


@pytest.mark.parametrize(
    "values",
    [torch.rand(1, 5).double(), torch.rand(1, 5).half(), torch.rand(1, 9), torch.rand(0, 5)],
    ids=["fp64", "fp16", "long", "empty"],
)
def test_what_no_kernel_is_for_is_done_as_ever(values: Tensor, monkeypatch: pytest.MonkeyPatch, possible: None) -> None:
    @fused.fused(8)
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    instead(monkeypatch, SimpleNamespace(doubled=lambda x: 3 * x))
    assert doubled(torch.ones(1, 8)).eq(3).all()
    assert doubled(values).equal(2 * values)
    monkeypatch.setattr(fused, "undisturbed", lambda tensors: False)
    assert doubled(torch.ones(1, 8)).eq(2).all()


def test_a_selection_on_the_host_asks_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selectors.smallest(torch.tensor([[3.0, 1.0, 2.0]]), 1).tolist() == [2.0]


def broken(*given: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("module", "said"),
    [(None, "ModuleNotFoundError|ImportError"), (SimpleNamespace(smallest=broken), "RuntimeError: Failed to find C")],
    ids=["no Triton", "no compiler"],
)
def test_a_kernel_that_fails_is_warned_of_once(
    module: Any, said: str, monkeypatch: pytest.MonkeyPatch, possible: None
) -> None:
    instead(monkeypatch, module)
    values = torch.tensor([[3.0, 1.0, 2.0]])
    with pytest.warns(RuntimeWarning, match=f"kernels of Triton do not work: .*({said})"):
        assert selectors.smallest(values, 1).tolist() == [2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selectors.smallest(values, 0).tolist() == [1.0]
        assert selectors.farthest_points(torch.rand(1, 3, 3), 2).shape == (1, 2)


def test_a_full_device_is_no_reason_to_give_kernels_up(monkeypatch: pytest.MonkeyPatch, possible: None) -> None:
    def full(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    instead(monkeypatch, SimpleNamespace(smallest=full))
    with pytest.raises(torch.OutOfMemoryError):
        selectors.smallest(torch.ones(1, 3), 1)
    assert fused.failed == []
