"""FitPrune: scores and counts against a restatement, its schedules, its calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference
import slow
import torch
from models import N, picture, tiny
from torch import Tensor

from vtp_plugin import get_strategy
from vtp_plugin.errors import PruningError
from vtp_plugin.strategies.fitprune import fitted


def importance(attention: Tensor, span: list[int], text: list[int]) -> list[float]:
    """Head-max map [L, L]: mean from the image's tokens times sum from the text, per token of the image."""
    rows = attention.double().tolist()
    self_ = [sum(rows[j][i] for j in span) / len(span) for i in span]
    cross = [sum(rows[t][i] for t in text) for i in span]
    return [a * b for a, b in zip(self_, cross, strict=True)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("hyper", [{"schedule": "96 64 32"}, {"keep_ratio": 0.6}, {"keep_tokens": 12, "start": 2}])
@torch.no_grad()
def test_a_model_without_a_cache_says_the_same(hyper: dict, attention: str):
    """Layer by layer: what it sees, what the attention of the layer before says, and the logits of the answer."""
    host, ids = tiny("llava_hf", attention), [1, 5, picture(3), 9, 11, 4]
    strategy, depth = get_strategy("fitprune")(**hyper), 4
    with host.prune(strategy) as pruned:
        output = host.generate([ids])
    blocks = reference.clip_tower(host.tower, host.normalise([ids[2]])[0], range(N))
    embed = lambda words: host.decoder.embed_tokens(torch.tensor(words))  # noqa: E731
    x = torch.cat([embed([1, 5]), host.projector(blocks[-2].output[1:]), embed([9, 11, 4])])
    span, text, hidden = list(range(2, 2 + N)), list(range(2 + N, 5 + N)), {}
    for event, layer in zip(pruned.events, range(strategy.start, depth), strict=True):
        _, attentions = reference.llama(host, x, hidden)
        scores = importance(attentions[layer - 1].amax(0), span, text)
        kept = slow.best(scores, counts(hyper, depth)[layer])
        assert event.layer == layer
        assert event.kept[0].tolist() == [span[i] - 2 for i in kept]
        hidden[layer] = [c for i, c in enumerate(span) if i not in kept]
        span = [span[i] for i in kept]
    answer = output.sequences[0].tolist()
    logits, _ = reference.llama(host, torch.cat([x, embed(answer[:-1])]), hidden)
    torch.testing.assert_close(torch.cat(output.logits), logits[len(x) - 1 :], atol=2e-4, rtol=1e-4)


def counts(hyper: dict, depth: int) -> list[int]:
    """Tokens that each layer sees."""
    if "schedule" in hyper:
        deltas = [int(part) for part in hyper["schedule"].split()]
        return [max(1, round(N * (1 - sum(deltas[:layer]) / 576))) for layer in range(depth)]
    mean, start = hyper.get("keep_ratio", hyper.get("keep_tokens", 0) / N), hyper.get("start", 1)
    shares = lambda f: [1.0 if layer < start else f ** (layer - start + 1) for layer in range(depth)]  # noqa: E731
    factor = min((f / 65536 for f in range(65537)), key=lambda f: abs(sum(shares(f)) / depth - mean))
    return [max(1, round(N * share)) for share in shares(factor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["random", "repeated", "equal", "zero"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (36, 9), (36, 36)])
def test_the_product_ranks(n: int, k: int, kind: str, dtype: torch.dtype):
    self_, cross = slow.attention(2, n), 3 * slow.attention(2, n)
    if kind != "random":
        places = torch.arange(n) % (4 if kind == "repeated" else 1)
        self_, cross = (x[:, places.clamp(max=n - 1)] * (kind != "zero") for x in (self_, cross))
    seen = slow.visual(torch.zeros(2, n, 3, dtype=dtype), self_attention=self_, cross_attention=cross, cut=(0, 1))
    kept = slow.columns(get_strategy("fitprune")(keep_ratio=(1 + k / n) / 2).decide(seen))
    products = (self_ * cross).tolist()
    assert kept == [slow.best(row, k) for row in products]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("start", [1, 3])
def test_without_a_file_the_mean_over_the_layers_is_the_budget(ratio: float, start: int):
    shares = get_strategy("fitprune")(start=start).shares(ratio, 32)
    assert sum(shares) / 32 == pytest.approx(ratio, abs=1e-3)
    assert shares[:start] == [1.0] * start
    assert shares == sorted(shares, reverse=True)


def test_a_budget_that_the_first_layers_exceed_is_refused():
    spent = "is not possible with 4 decoder layers: the mean over them is 0.25 at least, because the first 1 see every"
    with pytest.raises(ValueError, match=f"fitprune: keep_ratio=0.11 {spent}"):
        get_strategy("fitprune")(keep_ratio=0.11).cut_layers(4)
    assert get_strategy("fitprune")(keep_ratio=0.11).cut_layers(32) == tuple(range(1, 32))


def test_the_record_reports_what_is_really_spent():
    from vtp_plugin.reporting.record import samples_of

    host, found = tiny("llava_hf"), []
    with host.prune("fitprune", keep_ratio=0.6) as pruned:
        pruned.finished.append(lambda call: found.extend(samples_of(pruned, call)))
        host.generate([[1, 5, picture(3), 9]])
    assert found[0]["prompt_tokens"]["mean_over_layers"] == sum(counts({"keep_ratio": 0.6}, 4)) / 4 + 3


# -- calibration ------------------------------------------------------------------------------------------------------


def slowly_fitted(samples: list, alpha: float) -> list[float]:
    """Mean shares per layer, every prefix tried."""
    rows = []
    for layers in samples:
        n, row = len(layers[0][0]), [1.0]
        present = set(range(n))
        for signals in layers:
            gone = []
            for values in (signal.tolist() for signal in signals):
                order = sorted(present, key=lambda i: (values[i], i))
                good = [
                    m for m in range(len(order) + 1) if sum(values[i] for i in order[m:]) >= (1 - alpha) * sum(values)
                ]
                gone.append(set(order[: max(good, default=0)]))
            present -= gone[0] & gone[1]
            row.append(len(present) / n)
        rows.append(row)
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_the_fit_deletes_what_both_attentions_can_spare(target: float):
    samples = [[tuple(slow.attention(2, 12)) for _ in range(3)] for _ in range(4)]
    found = fitted(samples, target)
    grid = [slowly_fitted(samples, step / 2048) for step in range(2049)]
    enough = [row for row in grid if sum(row) / 4 <= target]
    assert sum(found) / 4 <= target
    assert sum(found) / 4 >= sum(enough[0]) / 4 - 1e-9  # no grid point with less tolerance is enough
    assert any(row == pytest.approx(found) for row in grid)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({"left": [[1.0, 0.2, 0.0, 0.0], [1.0, 0.8, 0.4, 0.2]]}))
    return path


def test_a_file_is_interpolated(file: Path):
    strategy = get_strategy("fitprune")(schedule=str(file))
    assert strategy.shares(0.3, 4) == pytest.approx([1.0, 0.2, 0.0, 0.0])
    assert strategy.shares(0.45, 4) == pytest.approx([1.0, 0.5, 0.2, 0.1])
    assert strategy.shares(1.0, 4) == [1.0] * 4
    assert strategy.shares(0.15, 4) == pytest.approx([0.5, 0.1, 0.0, 0.0])
    host = tiny("llava_hf")
    with host.prune(get_strategy("fitprune")(schedule=str(file), keep_ratio=0.6)) as pruned:
        host.generate([[1, 5, picture(3), 9]])
    assert [event.after for event in pruned.events] == [[29], [14], [7]]


def test_a_file_for_another_depth_is_refused(file: Path):
    file.write_text(json.dumps({"left": [[1.0, 0.5]]}))
    with pytest.raises(PruningError, match="was fitted for 2 decoder layers, this model has 4"):
        tiny("llava_hf").prune(get_strategy("fitprune")(schedule=str(file)))


@pytest.mark.parametrize(
    "content", ['{"left": [[2, 3]]}', '{"x": 1}', '{"left": 5}', '{"left": [[]]}', "[", '{"left": [["a"]]}']
)
def test_a_file_without_schedules_is_refused(file: Path, content: str):
    file.write_text(content)
    with pytest.raises(PruningError, match="fitprune: schedule must be a file that `vtp calibrate fitprune` wrote"):
        get_strategy("fitprune")(schedule=str(file))


@pytest.mark.parametrize(("value", "budget"), [("nowhere.yaml", {}), ("1 x", {}), ("1 2", {"keep_ratio": 0.5})])
def test_wrong_schedules_are_refused(value: str, budget: dict):
    with pytest.raises(PruningError, match=r"fitprune: (schedule must be a file, or tokens|keep_ratio does not apply)"):
        get_strategy("fitprune")(schedule=value, **budget)


@pytest.mark.slow
def test_the_command_fits_the_embedded_model(tmp_path: Path):
    from PIL import Image
    from typer.testing import CliRunner

    from vtp_plugin.cli import app, vtp_register_commands

    if not app.registered_commands:
        vtp_register_commands(app)
    Image.frombytes("RGB", (64, 64), bytes(range(256)) * 48).save(tmp_path / "a.png")
    target = tmp_path / "fit.json"
    result = CliRunner().invoke(app, ["calibrate", "fitprune", str(tmp_path / "a.png"), "-o", str(target)])
    assert result.exit_code == 0, result.output
    left = json.loads(target.read_text())["left"]
    assert len(left) == 9
    for step, row in enumerate(left, 1):
        assert row[0] == 1.0
        assert row == sorted(row, reverse=True)
        possible = 1 / len(row)
        assert sum(row) / len(row) <= max(step / 10, possible) + 0.01
    assert get_strategy("fitprune")(schedule=str(target)).cut_layers(len(left[0])) == tuple(range(1, len(left[0])))
    for arguments in (["fitprune", "x", "--target", "0.2"], ["vprune", str(target)]):
        assert "--target" in str(CliRunner().invoke(app, ["calibrate", *arguments]).exception)
