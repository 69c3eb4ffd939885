"""What every test starts from: no hub, one thread (a second only slows tensors of this size), one seed."""

from __future__ import annotations

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # bf16 layers crash where AMX is promised and missing

import matrix
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def anyres(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """The authors' LLaVA-1.6."""
    pytest.importorskip("llava.model.language_model.llava_llama")
    from family_runs import anyres_model

    return anyres_model(str(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def waiting_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of this test start lmms-eval in the process that waits with it: see tests/warm.py."""
    pytest.importorskip("lmms_eval")
    import warm

    from vtp_plugin.compare import sweep

    run, launch = sweep.run, " ".join(warm.python())
    monkeypatch.setattr(sweep, "run", lambda *given, **named: run(*given, **named | {"launch": launch}))


@pytest.hookimpl(trylast=True)  # behind -k and -m: what they leave is covered
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of products a covering part; files that take long come first, or a worker would end with one of them."""
    matrix.select(config, items)
    early = Counter(i.path for i in items if i.get_closest_marker("slow") or i.get_closest_marker("long"))
    items.sort(key=lambda item: -early[item.path])
