"""Devices: what vendors say about common cards, and what a short probe measures on this machine.

Peaks are dense tensor-core figures with fp32 accumulation, as in the data sheets named in `source`.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from pydantic import TypeAdapter, ValidationError

from vtp_plugin import files
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.metrics.latency import clock

REACHED = 0.6  # of a vendor's peak FLOPs and bandwidth that a good implementation reaches; a probe measures what is
WIDTHS = (1024, 4096)  # of a vision tower and of a language model: small matrices reach less
TOKENS = 640  # of a prompt with a picture, as the probe multiplies them


@dataclass(frozen=True)
class Card:
    """One device. Rates are FLOP/s by dtype (and, of a probe, by width of the model), bytes/s and bytes."""

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    source: str
    reached: float = REACHED
    by_width: Mapping[str, float] = field(default_factory=dict)  # a probe: FLOP/s in layers of that width

    def rate(self, dtype: str, width: int) -> float:
        """FLOP/s that layers of this width reach: of a probe, interpolated over log width."""
        if dtype not in self.flops:
            raise PruningError(f"{self.name} has no figure for {dtype}; it has {', '.join(self.flops)}")
        if not self.by_width:
            return self.reached * self.flops[dtype]
        (narrow, low), (wide, high) = sorted((int(w), rate) for w, rate in self.by_width.items())
        place = math.log(width / narrow) / math.log(wide / narrow)
        return low + (high - low) * min(1.0, max(0.0, place))

    @property
    def bytes_per_second(self) -> float:
        return self.reached * self.bandwidth

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def _card(name: str, half: float, single: float, bandwidth: float, memory: float, source: str) -> Card:
    """TFLOP/s, GB/s and GB."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Card(name, flops, bandwidth * 1e9, memory * 1e9, source)


CARDS: dict[str, Card] = {
    "a100": _card("A100 80GB SXM", 312, 19.5, 2039, 80, "NVIDIA A100 data sheet"),
    "h100": _card("H100 SXM", 989, 67, 3350, 80, "NVIDIA H100 data sheet"),
    "h200": _card("H200 SXM", 989, 67, 4800, 141, "NVIDIA H200 data sheet"),
    "l4": _card("L4", 121, 30.3, 300, 24, "NVIDIA L4 data sheet"),
    "l40s": _card("L40S", 362, 91.6, 864, 48, "NVIDIA L40S data sheet"),
    "rtx4090": _card("RTX 4090", 165.2, 82.6, 1008, 24, "NVIDIA Ada GPU architecture white paper"),
    "rtx3090": _card("RTX 3090", 71, 35.6, 936, 24, "NVIDIA GA102 GPU architecture white paper"),
    "mi300x": _card("MI300X", 1307.4, 163.4, 5300, 192, "AMD Instinct MI300X data sheet"),
}
NAMES_OF_DEVICES = {  # what torch calls a card, in part -> its key
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
    "L40S": "l40s",
    "NVIDIA L4": "l4",
    "4090": "rtx4090",
    "3090": "rtx3090",
    "MI300X": "mi300x",
}


def card_of(name: str, dtype: str = "float32") -> Card:
    """A card by its key, a file that a probe wrote, or `probe` for this machine."""
    if name == "probe":
        return probe(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    if name.endswith(".json"):
        return from_file(Path(name))
    if name not in CARDS:
        raise unknown("device", name, (*CARDS, "probe"))
    return CARDS[name]


def from_file(path: Path) -> Card:
    """What `vtp plan --device probe --save-device FILE` wrote."""
    if not path.is_file():
        raise PruningError(f"file not found: {path}")
    read = files.read_json(path)
    try:
        return TypeAdapter(Card).validate_python(asdict(Card(**read)))
    except (TypeError, ValidationError):
        raise PruningError(f"{path} is not a device that `vtp plan --save-device` wrote") from None


def known_as(device: str) -> Card | None:
    """The card that torch names so; None for one that is not in the table."""
    return next((CARDS[key] for part, key in NAMES_OF_DEVICES.items() if part in device), None)


# -- the probe --------------------------------------------------------------------------------------------------------


def probe(
    device: torch.device, dtype: str, seconds: float = 9.0, widths: tuple[int, int] = WIDTHS, tokens: int = TOKENS
) -> Card:
    """Measure matrix products at two widths, and the bandwidth of a decoding step's products with one vector."""
    each, kind = seconds / (len(widths) + 1), getattr(torch, dtype)
    rates = {str(width): _product(device, kind, width, tokens, each) for width in widths}
    vector = _product(device, kind, widths[-1], 1, each)  # 2 FLOPs per element that is read
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or "cpu"
    return Card(
        name=name,
        flops={dtype: rates[str(widths[-1])]},
        bandwidth=vector / 2 * kind.itemsize,
        memory=float(_memory(device)),
        source=f"measured in {seconds:g} s with torch {torch.__version__}, {torch.get_num_threads()} threads",
        reached=1.0,
        by_width=rates,
    )


def _product(device: torch.device, dtype: torch.dtype, width: int, tokens: int, seconds: float) -> float:
    """FLOP/s of [tokens, width] x [width, 4 width]; the matrices of a vector take turns, so that none stays cached."""
    x = torch.randn(tokens, width, device=device).to(dtype)
    matrices = [torch.randn(4 * width, width, device=device).to(dtype) for _ in range(4 if tokens == 1 else 1)]
    took = _median(lambda: [torch.nn.functional.linear(x, matrix) for matrix in matrices], device, seconds)
    return 2 * tokens * sum(matrix.numel() for matrix in matrices) / took


def _median(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median seconds of one round; the first warms up."""
    work()
    end, found = time.perf_counter() + seconds, []
    while not found or time.perf_counter() < end:
        started = clock(device)
        work()
        found.append(clock(device) - started)
    return median(found)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
