"""Does the embedded model train on this device? Some minutes' worth of steps from the shipped weights, and their pace.

Run in a process of its own (`python -m vtp_plugin.bench.training`): scenes are drawn by workers, which must be forked
before a device is used.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtp_plugin.tiny.fitting import Run, parameter_groups, update
from vtp_plugin.tiny.pool import draw_pool
from vtp_plugin.tiny.train import LOSSES, PLANS, start_from_package
from vtp_plugin.tiny.workshop import TRAINS, Workshop

STAGE, PICTURES, FEWEST = "join", 200, 2


def smoke(folder: Path, device: str, seconds: float) -> dict[str, Any]:
    """Train projector and language model for some seconds; what the first and the last step lost."""
    run = Run(folder, device)
    start_from_package(run)
    draw_pool(folder, "train", PICTURES)
    shop, plan = Workshop(run), PLANS[STAGE]
    learned = nn.ModuleDict({name: shop.networks[name] for name in TRAINS[STAGE]}).requires_grad_(True)
    optimizer = torch.optim.AdamW(parameter_groups(learned, plan.decay), plan.rate / 10)
    losses: list[float] = []
    began = time.monotonic()
    while len(losses) < FEWEST or time.monotonic() - began < seconds:
        losses.append(update(learned, optimizer, plan.rate / 10, partial(_loss, shop, plan.batch, len(losses)))["loss"])
    spent = time.monotonic() - began
    return {
        "stage": STAGE,
        "steps": len(losses),
        "batch": plan.batch,
        "seconds": spent,
        "steps_per_second": len(losses) / spent,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "finite": all(map(math.isfinite, losses)),
    }


def _loss(shop: Workshop, batch: int, step: int) -> Any:
    return LOSSES[STAGE](shop.networks, shop.batch(STAGE, batch, step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(smoke(Path(folder), asked.device, asked.seconds)))


if __name__ == "__main__":
    main()
