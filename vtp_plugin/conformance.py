"""Does a strategy keep its promises? Checks on synthetic tokens that need no model, for built-ins and strangers alike.

Every check is a function of a strategy class that returns a remark, or raises `Broken` with what failed and why.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vtp_plugin import signals
from vtp_plugin.errors import PruningError
from vtp_plugin.outcomes import Broken, Outcome, outcomes
from vtp_plugin.samples import REAL, cuts_of, row_of, run, same, sample, selection_of, survivors
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import BUDGET, PruningStrategy
from vtp_plugin.tokens import Selection

SIZES = (1, 2, 7, 36, 144)
KINDS = ("random", "equal", "zero", "repeated", "large")
VALUES = (True, False, 0, 1, 2, 3, 5, 8, 64, -1, -2, 0.0, 0.1, 0.5, 0.9, 1.0, 3.0, 40.0, "1 2 3", "2 5 9", "other")
PREFILL = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # multiply-accumulates per token of a LLaVA-1.5-7B, attention aside


def conforms(cls: type[PruningStrategy]) -> Iterator[Outcome]:
    """Every check on the strategy, one after the other; a class that cannot run at all gets no further."""
    return outcomes(CHECKS, cls, needed=_runnable)


def _make(cls: type[PruningStrategy], k: int | None = None) -> PruningStrategy:
    return cls() if k is None or not _budgeted(cls) else cls(keep_tokens=k)


def _budgeted(cls: type[PruningStrategy]) -> bool:
    return "keep_tokens" in cls.fields()


def _budgets(cls: type[PruningStrategy], n: int) -> list[int | None]:
    return sorted({1, max(1, n // 4), max(1, n - 1), n}) if _budgeted(cls) else [None]


# -- the checks -------------------------------------------------------------------------------------------------------


def _runnable(cls: type[PruningStrategy]) -> str:
    """can be given to a model: a dataclass, at a stage that gives its signals"""
    if "__dataclass_fields__" not in vars(cls):
        raise Broken(f"{_where(cls)}: the class needs @dataclass(kw_only=True), or its fields are no hyper-parameters")
    strategy = cls()
    if strategy.stage is Stage.LLM and not cuts_of(strategy):
        raise Broken(f"{_where(cls)}: an llm method says where it cuts: decoder_layer, or cut_layers for several cuts")
    if reason := signals.wrong(strategy, inside=bool(strategy.stage is Stage.VIT and cuts_of(strategy))):
        raise Broken(f"{_where(cls, 'needs')}: `{strategy.name}`: {reason}")
    return ""


def _where(cls: type[PruningStrategy], name: str = "") -> str:
    """File and line of a class, or of what it says about a name."""
    lines, first = inspect.getsourcelines(cls)
    said = rf"\s*(def )?{name}\b" if name else r"\s*class\b"
    offset = next((number for number, line in enumerate(lines) if re.match(said, line)), 0)
    return f"{inspect.getsourcefile(cls)}:{first + offset}"


def _defaults(cls: type[PruningStrategy]) -> str:
    """has a name, a source and defaults that construct"""
    strategy = cls()
    for field in ("name", "paper", "stage"):
        if not getattr(strategy, field, None):
            raise Broken(f"the class says no {field}")
    if not (cls.__doc__ or "").strip() or cls.__doc__.startswith(f"{cls.__name__}("):
        raise Broken("the class has no docstring: its first line is what `vtp list` shows")
    return f"{strategy.stage.value} stage, needs {', '.join(strategy.needs) or 'nothing but the tokens'}"


def _budget(cls: type[PruningStrategy]) -> str:
    """keeps exactly what was asked for, no token twice"""
    for n in SIZES:
        for k in _budgets(cls, n):
            for kind in KINDS:
                strategy = _make(cls, k)
                selections = run(strategy, sample(strategy, n, kind=kind))
                _check_kept(strategy, selections, n, f"{kind} tokens, N = {n}" + (f", K = {k}" if k else ""))
    if not _budgeted(cls):
        return "no budget: its thresholds decide"
    return "keep_ratio is the paper's label, the number left differs" if cls.nominal else ""


def _check_kept(strategy: PruningStrategy, selections: list[Selection], n: int, where: str) -> None:
    for selection in selections:
        for columns in selection.sources:
            real = columns[columns >= 0]
            if len(real.unique()) < len(real) or len(columns) > n or len(columns) == 0:
                raise Broken(f"{where}: columns {columns.tolist()[:20]} repeat a token, or are none or too many")
        if selection.tokens is not None and [len(rows) for rows in selection.tokens] != selection.counts:
            raise Broken(f"{where}: new values for {[len(r) for r in selection.tokens]} of {selection.counts} tokens")
        if any(not torch.isfinite(rows.float()).all() for rows in selection.tokens or ()):
            raise Broken(f"{where}: a new value is not finite")
    if strategy.budgeted and not strategy.nominal and set(selections[-1].counts) != {strategy.count(n)}:
        raise Broken(f"{where}: asked for {strategy.count(n)}, kept {selections[-1].counts}")


def _everything(cls: type[PruningStrategy]) -> str:
    """keep_ratio=1 touches nothing"""
    if not _budgeted(cls):
        return "no budget"
    strategy = cls(keep_ratio=1.0)
    if not all(selection.keeps_all for selection in run(strategy, sample(strategy, 36))):
        raise Broken("with keep_ratio=1 a token is dropped, moved or changed")
    return ""


def _determinism(cls: type[PruningStrategy]) -> str:
    """answers the same twice, whatever torch's random numbers do"""
    strategy = _make(cls, 9)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(1)
        first = run(strategy, sample(strategy, 36))
        torch.manual_seed(2)
        again = run(_make(cls, 9), sample(strategy, 36))
    finally:
        torch.random.set_rng_state(state)
    if not same(first, again):
        raise Broken("two calls on the same tokens choose differently: seed a generator from `fingerprint`")
    return ""


def _precision(cls: type[PruningStrategy]) -> str:
    """judges half-precision tokens as their fp32 copies"""
    strategy = _make(cls, 9)
    for dtype in (torch.float16, torch.bfloat16):
        for kind in ("random", "equal", "large"):
            seen = sample(strategy, 36, kind=kind)
            if not seen.tokens.is_floating_point():
                return "integer pixels"
            half = dataclasses.replace(seen, tokens=seen.tokens.to(dtype))
            single = dataclasses.replace(seen, tokens=half.tokens.float())
            if not same(run(strategy, half), run(strategy, single)):
                raise Broken(f"{kind} tokens in {dtype} are judged otherwise than the same values in fp32")
    return ""


def _batch(cls: type[PruningStrategy]) -> str:
    """judges an image in a batch as alone"""
    strategy = _make(cls, 9)
    seen = sample(strategy, 36, b=3)
    try:
        together = run(strategy, seen)
    except RuntimeError as error:  # rows that keep unequal numbers at several cuts
        raise Broken(f"a batch of three images: {error}") from None
    for number in range(3):
        alone = run(strategy, row_of(seen, number))
        if not same(alone, [selection_of(selection, number) for selection in together]):
            raise Broken(f"image {number} of three is judged otherwise than alone")
    return ""


def _permutation(cls: type[PruningStrategy]) -> str:
    """says whether the order of the tokens matters"""
    strategy = _make(cls, 9)
    seen, order = sample(strategy, 36, b=1), torch.randperm(36, generator=torch.Generator().manual_seed(3))
    moved = survivors(strategy, seen, Selection(torch.ones(1, 36, dtype=torch.bool), source=(order,)))
    if strategy.ranks() and "fingerprint" not in strategy.needs:
        if not torch.allclose(strategy.score(moved), strategy.score(seen)[:, order]):
            raise Broken("a score must follow its token, but other tokens get it when they move")
        return "it does not, ties aside"
    before, after = (
        {int(v.index[0, c]) for c in run(strategy, v)[0].sources[0].tolist() if c >= 0} for v in (seen, moved)
    )
    return "it does not" if before == after else "it does"


def _finite(cls: type[PruningStrategy]) -> str:
    """scores are finite on degenerate tokens"""
    strategy = _make(cls, 1)
    if not strategy.ranks():
        return "no score"
    for n in SIZES:
        for kind in KINDS:
            scores = strategy.score(dataclasses.replace(seen := sample(strategy, n, kind=kind), tokens=seen.tokens))
            if scores.shape != seen.index.shape or not torch.isfinite(scores).all():
                raise Broken(f"{kind} tokens, N = {n}: scores {tuple(scores.shape)} must be [B, N] and finite")
    return ""


def _parameters(cls: type[PruningStrategy]) -> str:
    """every parameter changes something"""
    fields = [field for field in cls.fields() if field not in (*BUDGET, "budget")]
    bases = [{}, *({field: value} for field in fields for value in (*_options(cls, field), 0.1, 5))]
    idle = [field for field in fields if not any(_matters(cls, base, field) for base in bases if field not in base)]
    if idle:
        raise Broken(f"no value of {', '.join(idle)} changes a choice, a value, or where and what it reads")
    return ", ".join(fields)


def _options(cls: type[PruningStrategy], field: str) -> list[Any]:
    """The values of a field that is a choice, as its own error message lists them."""
    try:
        cls(**{field: "no such choice"})
    except PruningError as error:
        _, found, listed = str(error).partition("must be one of ")
        named = listed.split(", got")[0].split(", ") if found else []
        return [{"True": True, "False": False}.get(name, name) for name in named]
    return []


def _matters(cls: type[PruningStrategy], base: dict[str, Any], field: str) -> bool:
    for budget in [{"keep_tokens": 20}, {}] if _budgeted(cls) else [{}]:
        seen = []
        for changed in ({}, *({field: value} for value in (*_options(cls, field), *VALUES))):
            try:
                seen.append(_behaviour(cls(**base, **budget, **changed)))
            except (PruningError, TypeError):
                continue
            if seen[-1] != seen[0]:
                return True
    return False


def _behaviour(strategy: PruningStrategy) -> Any:
    """Everything that a model would notice of a configuration."""
    where = (strategy.stage, sorted(strategy.needs), strategy.tower_layer, strategy.shallow_layer)
    where += (strategy.clip_checkpoint, strategy.proportional, strategy.segments)
    kept = [
        ([own.tolist() for own in s.sources], [round(float(v.float().sum()), 3) for v in s.tokens or ()])
        for kind in ("random", "repeated", *["zero", "framed"] * (strategy.stage is Stage.PIXELS))  # black ones, too
        for s in run(strategy, sample(strategy, 64, kind=kind, b=1))
    ]
    return where, strategy.text_encoder, strategy.positions, cuts_of(strategy), kept


def _cost(cls: type[PruningStrategy]) -> str:
    """costs little beside the prefill of a LLaVA-1.5-7B"""
    speed, parts = _macs_per_second(), []
    for n in (576, 2880):
        strategy = cls(keep_ratio=1 / 9) if _budgeted(cls) else cls()
        seen = sample(strategy, n, b=1, widths=REAL)
        started = time.perf_counter()
        run(strategy, seen)
        seconds = time.perf_counter() - started
        share = seconds / ((PREFILL + 64 * n * 4096) * n / speed)
        parts.append(f"{n} tokens: {seconds * 1e3:.0f} ms, {share:.1%} of it")
    return "; ".join(parts) + " (this machine, fp32, 1/9 kept)"


def _macs_per_second() -> float:
    a, b = torch.randn(576, 4096), torch.randn(4096, 4096)
    a @ b
    started = time.perf_counter()
    for _ in range(3):
        a @ b
    return 3 * 576 * 4096**2 / (time.perf_counter() - started)


CHECKS: tuple[Callable[[type[PruningStrategy]], str], ...] = (
    _runnable,
    _defaults,
    _budget,
    _everything,
    _determinism,
    _precision,
    _batch,
    _permutation,
    _finite,
    _parameters,
    _cost,
)
