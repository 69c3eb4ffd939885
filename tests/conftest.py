"""What every test starts from: no hub, one thread (a second only slows tensors of this size), one seed."""

from __future__ import annotations

import gc
import os
from collections import Counter
from importlib.util import find_spec
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # bf16 layers crash where AMX is promised and missing

import matrix
import pytest
import torch
import warm

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What is there before a file's tests, above all imported packages, is not searched for garbage again.

    Half of a short run of lmms-eval would be its two collections of the whole heap.
    """
    gc.collect()
    gc.freeze()


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

    from vtp_plugin.compare import sweep

    run, launch = sweep.run, " ".join(warm.python())
    monkeypatch.setattr(sweep, "run", lambda *given, **named: run(*given, **named | {"launch": launch}))


@pytest.hookimpl(trylast=True)  # behind -k and -m: what they leave is covered
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of products a covering part; files that take long come first, or a worker would end with one of them."""
    matrix.select(config, items)
    early = Counter(i.path for i in items if i.get_closest_marker("slow") or i.get_closest_marker("long"))
    items.sort(key=lambda item: -early[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """One lmms-eval waits for all processes that run tests beside each other; those of vLLM start their own."""
    if find_spec("lmms_eval") and node.config.args != ["tests/hosts/vllm"]:
        node.workerinput["warm"] = warm.door()


def pytest_configure(config: pytest.Config) -> None:
    warm.shared[:] = filter(None, [getattr(config, "workerinput", {}).get("warm")])
