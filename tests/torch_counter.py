"""torch's own FLOP counter, probed before anything is compared with it.

torch 2.14 counts nothing for the attention kernel that a CPU runs. There the counter is given torch's own formula for
it; if it still does not count what a known call costs, every test that asks it fails with that sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

KERNELS = ("_scaled_dot_product_flash_attention_for_cpu",)
SHAPE = (2, 3, 5, 8)  # batch, heads, tokens, width of a head


def flop_counter() -> FlopCounterMode:
    """A counter to be opened around what is measured; AssertionError if it counts no attention."""
    return FlopCounterMode(display=False, custom_mapping={**_experts(), **_formulas()})


def _experts() -> dict[Any, Callable[..., int]]:
    """The formula for tokens [T, K] times the matrices of their experts [E, K, N], where torch lacks it."""
    product = getattr(torch.ops.aten, "_grouped_mm", None)
    return {} if product is None or product in flop_registry else {product: _grouped}


def _grouped(tokens: torch.Size, experts: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * tokens[0] * tokens[1] * experts[-1]


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """The formulas that this release of torch lacks, none if it counts right."""
    missing = {getattr(torch.ops.aten, name): _attention for name in KERNELS if hasattr(torch.ops.aten, name)}
    b, h, n, d = SHAPE
    expected, found = 2 * 2 * b * h * n * n * d, []
    for formulas in ({}, missing):
        found.append(_attention_flops(formulas))
        if found[-1] == expected:
            return formulas
    raise AssertionError(
        f"FlopCounterMode of torch {torch.__version__} counts {found[0]} FLOPs for an attention of {expected}, with "
        f"torch's own formula for the CPU kernel {found[1]}: nothing can be compared with it; see {__name__}.KERNELS"
    )


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """torch's formula for shapes [B, H, L, d]; it does not know that heads of queries may share one of keys."""
    key, value = ((*query[:2], *shape[2:]) for shape in (key, value))
    return sdpa_flop_count(query, key, value)


def _attention_flops(formulas: dict[Any, Callable[..., int]]) -> int:
    query = torch.randn(SHAPE)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        scaled_dot_product_attention(query, query, query)
    return counter.get_total_flops()
