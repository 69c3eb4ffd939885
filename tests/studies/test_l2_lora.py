"""l2-lora: the adapters learn, the encoder's own weights do not, and the study goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("peft")
pytest.importorskip("skimage")

from vtp_plugin.hosts.transformers.adapting import Plan, adapt
from vtp_plugin.hosts.transformers.zero_shot import ZeroShot
from vtp_plugin.studies import l2_lora, poster_l2
from vtp_plugin.studies.study import conduct

SMALL = {"limit": 6, "per_picture": 4, "batch": 8, "pruning": ["bottom", "l2"]}


def test_adapters_learn_and_nothing_else() -> None:
    encoder = ZeroShot(poster_l2.checkpoint_of("vtp-tiny"))
    own = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    pictures = poster_l2.embedded(8)[1]
    targets, cut = encoder.pictures(pictures, []), poster_l2.strategies("bottom", 0.5, None)
    before = (encoder.pictures(pictures, cut) * targets).sum(-1).mean()
    losses = adapt(encoder, pictures, targets, cut, Plan(rank=4, rate=2e-3, batch=8, epochs=6, seed=0))
    after = (encoder.pictures(pictures, cut) * targets).sum(-1).mean()
    assert losses[0] == pytest.approx(1 - before.item(), abs=1e-4)
    assert len(losses) == 6
    assert after > before + 0.01
    now = {name.replace(".base_layer", ""): value for name, value in encoder.model.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in own.items())
    adapted = {name for name in now if "lora_" in name}
    assert adapted
    assert all(name.startswith("vision_model.") for name in adapted)


def test_the_study_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    console, out = Console(quiet=True), tmp_path / "study"
    with monkeypatch.context() as patch:
        patch.setattr(l2_lora.L2Lora, "tables", stop)
        with pytest.raises(KeyboardInterrupt):
            conduct("l2-lora", SMALL, out, console)
    monkeypatch.setattr(l2_lora.L2Lora, "_arm", stop)  # would raise if it were asked again
    results = json.loads(conduct("l2-lora", SMALL, out, console).read_text())["results"]
    assert results["pictures"] == 6
    assert results["learned"] == 24
    bottom, top = results["arms"]
    assert (bottom["method"], top["method"]) == ("bottom", "l2")
    assert bottom["unpruned"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert top["before"]["cosine"] > bottom["before"]["cosine"]
    assert len(top["losses"]) == 2 * 24 // 8
    table = (out / "table.md").read_text()
    assert f"{top['after']['cosine']:.3f}" in table
    assert (out / "adapted.png").is_file()


def test_no_test_scene_is_learned_from() -> None:
    from vtp_plugin.tiny.scenes import sample_scene

    assert sample_scene("train", 0) != sample_scene("test", 0)
    assert l2_lora._Scene(3).picture().size == poster_l2.embedded(1)[1][0].size
