"""Every family, stage and signal on a pretend CUDA device, and the device itself.

By default every strategy runs on the families in WHOLE, and one of every stage on the others, in one of the four
combinations of precision and layout, in turn; VTP_FULL_MATRIX=1 runs every strategy on every family in all four.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, product
from typing import Any

import pytest
import torch
from matrix import FULL, dear
from pretend import Counts, Device, OnDevice
from pretend_hosts import CASES, DTYPES, LAYOUTS, STAGES, can, host
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vtp_plugin as vtp
from vtp_plugin import Stage, plugins

pytestmark = pytest.mark.long

PAIRS = list(product(DTYPES, LAYOUTS))
WHOLE = dear(STAGES, ["llava"])
COMBINATIONS = [(name, stage) for name, stages in STAGES.items() for stage in stages]


def test_every_signal_has_a_case() -> None:
    named = {name for cases in CASES.values() for name, _ in cases}
    asked = {need for cls in plugins.strategies().values() for need in cls().needs}
    covered = {need for name in named for need in vtp.get_strategy(name)().needs}
    covered |= {n for cases in CASES.values() for name, f in cases for n in vtp.get_strategy(name)(**f).needs}
    assert asked <= covered


@pytest.mark.parametrize(("name", "stage"), COMBINATIONS, ids=lambda value: value)
def test_values_are_those_of_the_cpu(name: str, stage: str) -> None:
    """No tensor is on the wrong device (that raises), and every bit is as on the CPU."""
    if name == "llava":
        pytest.importorskip("llava")
    turn = list(STAGES).index(name) + list(CASES).index(stage)  # all four for a family, from stage to stage
    places = [(turn + number) % len(CASES[stage]) for number in range(len(CASES[stage]))]
    able = (number for number in places if can(name, *CASES[stage][number]))
    chosen = list(islice(able, None if name in WHOLE else 1))
    assert chosen
    for number in chosen:
        strategy, fields = CASES[stage][number]
        for dtype, layout in PAIRS if FULL else PAIRS[(turn + number) % len(PAIRS) :][:1]:
            one = host(name, dtype)
            made = one.strategy(strategy, **fields)
            there, counts = one.pretended(made, layout)
            here = one.here(made, layout)
            assert there.kept == here.kept, (strategy, dtype, layout)
            assert there.logits.equal(here.logits), (strategy, dtype, layout)
            assert sum(map(len, here.kept)) > 0
            assert counts.kernels > 100


@pytest.mark.parametrize("name", STAGES)
def test_the_unpruned_host_runs_on_it_too(name: str) -> None:
    if name == "llava":
        pytest.importorskip("llava")
    there, counts = host(name).pretended(None, "batch")
    assert there.logits.equal(host(name).here(None, "batch").logits)
    assert not [place for place in counts.places() if "vtp_plugin" in place and "hosts.llava.frozen" not in place]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", dear(["llava_next", "gemma3"], ["gemma3"]))
@torch.no_grad()
def test_text_may_lie_beside_the_host(name: str, way: dict[str, str], layout: str) -> None:
    """`generate` takes ids and masks to the model pass by pass, where the host does: transformers 5.24 and later."""
    one, settings = host(name), {"max_new_tokens": 3, "do_sample": False, **way}
    with one.device as device:
        here, there = one.inputs(layout), device.put(one.inputs(layout))
        mixed = here | {key: value for key, value in there.items() if key.startswith(("pixel", "image"))}
        try:
            one.there.generate(**mixed, **settings)
        except RuntimeError as error:
            pytest.skip(f"not this host: {error}")
        for case in ("stride", *(["fastv"] if not way else [])):
            with vtp.prune(one.there, case, processor=one.processor):
                wanted, found = (one.there.generate(**given, **settings) for given in (there, mixed))
            assert found.tolist() == wanted.tolist()


MOVED = [("llava_hf", "projector"), ("llava_next", "pixels"), ("llava_next", "vit"), ("qwen2_5_vl", "projector")]


@pytest.mark.parametrize(("name", "stage"), [*MOVED, *((name, stage) for name, stage in COMBINATIONS if FULL)])
@torch.no_grad()
def test_a_model_may_be_moved_while_it_is_attached(name: str, stage: str) -> None:
    """What was remembered of a call on the CPU follows the model to the device."""
    one, settings = host(name), {"max_new_tokens": 2, "do_sample": False}
    strategy, fields = next(case for case in CASES[stage] if can(name, *case))
    model, made = one.build().requires_grad_(False), one.strategy(strategy, **fields)
    with sdpa_kernel(SDPBackend.MATH), vtp.prune(model, made, processor=one.processor):
        here = model.generate(**one.inputs("batch"), **settings)
        with Device() as device:
            there = device.move(model).generate(**device.put(one.inputs("batch")), **settings)
            assert there.tolist() == here.tolist()


# -- the device itself ------------------------------------------------------------------------------------------------


def counted(work: Callable[[Tensor], Any], values: Any = None) -> Counts:
    """What `work` does with a tensor of the device."""
    with Device() as device:
        x = device.put(torch.arange(12.0).view(3, 4) if values is None else values)
        with device.counting() as counts:
            work(x)
    return counts


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "if": lambda x: bool(x.any()),
    "len of a selection": lambda x: x[x > 3],
    "assignment by a mask": lambda x: x.__setitem__(x > 3, 0.0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 3),
    "unique": lambda x: x.unique(),
    "isin": lambda x: torch.isin(x, x[0]),
    "masked_select": lambda x: x.masked_select(x > 3),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy to the host": lambda x: torch.zeros(3, 4).copy_(x),
    "repeat_interleave": lambda x: x[0].repeat_interleave(x[0].long()),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "int": lambda x: int(x.argmax()),
    "format": lambda x: f"{x.sum():.1f}",
    "python number of a list": lambda x: torch.tensor([x[0, 0], 1.0]),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + x.mean()).softmax(-1),
    "sort and gather": lambda x: x.gather(1, x.sort(descending=True).indices[:, :2]),
    "shapes": lambda x: x.view(-1).reshape(4, 3)[..., :2].expand(2, 4, 2).shape,
    "made there": lambda x: torch.zeros(3, device=x.device) + torch.arange(3, device="cuda"),
    "a known output size": lambda x: x[0].repeat_interleave(torch.ones_like(x[0]).long(), output_size=4),
    "to the host without waiting": lambda x: x.to("cpu", non_blocking=True),
    "shapes in place": lambda x: x.clone().unsqueeze_(0).squeeze_(0).t_() + torch.zeros(4, 3, device="cuda"),
    "masked_fill": lambda x: x.masked_fill(x > 3, 0.0),
    "a number of the host": lambda x: x + torch.tensor(2.0),
    "a number of Python": lambda x: torch.where(x > 3, x, -1.0),
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device=x.device),
    "to": lambda x: torch.ones(3).to("cuda"),
    "to like": lambda x: torch.ones(3).to(x),
    "assigned": lambda x: x.__setitem__(0, torch.ones(4)),
    "index": lambda x: x[torch.tensor([0, 2])],
    "list as index": lambda x: x[[0, 2]],
    "number chosen by where": lambda x: torch.where(x > 3, x, torch.tensor(-1.0)),
}
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + torch.ones(4),
    "matmul": lambda x: x @ torch.ones(4, 2),
    "cat": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "stack of a number": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "embedding": lambda x: nn.functional.embedding(torch.zeros(2, dtype=torch.long), x),
    "index of the host": lambda x: torch.arange(4)[x[0].long()],
    "in place": lambda x: torch.ones(3, 4).add_(x),
    "in place, a number": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "scatter": lambda x: torch.zeros(3, 4).scatter_(1, x.long().clamp(max=3), 1.0),
    "where": lambda x: torch.where(torch.ones(3, 4) > 0, x, x),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], torch.ones(1, 3, 4), x[None]),
    "generator": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait(name: str) -> None:
    assert counted(WAITS[name]).syncs == 1


@pytest.mark.parametrize("name", FREE)
def test_what_does_not(name: str) -> None:
    counts = counted(FREE[name])
    assert (counts.syncs, counts.copies) == (0, 0)


@pytest.mark.parametrize("name", COPIES)
def test_what_copies_host_data(name: str) -> None:
    counts = counted(COPIES[name])
    assert (counts.syncs, counts.copies) == (0, 1)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_device_is_an_error(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"same device|on the device|device type"):
        counted(WRONG[name])


def test_numpy_of_the_device_is_an_error() -> None:
    with pytest.raises(TypeError, match="cuda:0"):
        counted(lambda x: x.numpy())


def test_kernels_are_operators_without_views() -> None:
    assert counted(lambda x: x.t().reshape(2, 6).sum(0)).kernels == 2  # a copy and a sum
    assert counted(lambda x: nn.functional.linear(x, x)).kernels == 1
    assert counted(lambda x: x[None, 1:, ::2].transpose(0, 1).squeeze()).kernels == 0
    assert counted(lambda x: torch.empty(3, device="cuda")).kernels == 0
    q = torch.randn(1, 2, 5, 4)
    attend = nn.functional.scaled_dot_product_attention
    assert counted(lambda q: attend(q, q, q, is_causal=True), q).kernels == 1


def test_bytes_live_as_long_as_something_holds_them() -> None:
    with Device() as device:
        x = device.put(torch.zeros(1000))
        with device.counting() as counts:
            y = x + 1
            view = y[:10]
            del y
            assert device.live_bytes == 8000  # the view holds the storage
            z = view * 2
            del view
        assert (counts.before_bytes, counts.peak_bytes, counts.after_bytes) == (4000, 8040, 4040)
        assert z.tolist() == [2.0] * 10


def test_a_model_is_moved_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    expected = model(torch.tensor([1, 2])).detach()
    with Device() as device:
        device.move(model)
        assert model[1].weight is model[0].weight
        assert isinstance(model[0].weight, OnDevice)
        with torch.no_grad():
            found = model(device.put(torch.tensor([1, 2])))
        assert found.device == torch.device("cuda", 0)
        assert found.cpu().equal(expected)  # the ids are gone by now
        assert device.live_bytes == 80 + 40


def test_nothing_is_left_of_it() -> None:
    before = torch.cuda.synchronize, torch.cuda.memory_allocated
    with Device():
        assert torch.cuda.synchronize is not before[0]
    assert (torch.cuda.synchronize, torch.cuda.memory_allocated) == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device="cuda" if not torch.cuda.is_available() else "cuda:99")


def test_stages_are_the_adapters() -> None:
    assert {stage.value for stage in Stage} == set(CASES)
