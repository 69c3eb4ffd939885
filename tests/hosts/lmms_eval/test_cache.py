"""`--use_cache`: an answer is only served to the configuration that gave it.

The host's LLaVA classes never hit their own cache: they change the generation arguments of a request, which the host
reads once to look an answer up and again to file it. `Cache` shows it the first reading both times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lmms
import pytest

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval import evaluation as integration

pytest.importorskip("lmms_eval")

TINY = "pretrained=vtp-tiny"


class Cache:
    """A response cache folder, and how many answers of each run came out of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from lmms_eval.caching import response_cache as host

        self.folder, self.stats, self.read = folder, [], {}
        finish, extract = host.ResponseCache.finalize, host.extract_gen_kwargs

        def finalize(cache: host.ResponseCache, **arguments: Any) -> None:
            self.stats.append(cache.get_stats())
            finish(cache, **arguments)

        def extract_gen_kwargs(request: Any) -> dict[str, Any]:
            return self.read.setdefault(id(request), (request, dict(extract(request))))[1]

        monkeypatch.setattr(host.ResponseCache, "finalize", finalize)
        monkeypatch.setattr(host, "extract_gen_kwargs", extract_gen_kwargs)

    def run(self, arguments: str, tasks: str = lmms.SCENES) -> dict[str, Any]:
        options = {"limit": 1, "gen_kwargs": "max_new_tokens=2", "use_cache": str(self.folder)}
        return lmms.evaluate("llava", f"{TINY},{arguments}".rstrip(","), tasks, **options)

    def serves(self, arguments: str) -> bool:
        """Whether the answer of a run comes out of the cache."""
        self.run(arguments)
        assert self.stats[-1]["hits"] + self.stats[-1]["misses"] == 1
        return self.stats[-1]["hits"] == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return Cache(tmp_path / "answers", monkeypatch)


def test_only_the_same_configuration_hits(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "strategy.yaml"
    assert not cache.serves("")
    assert not cache.serves("pruning=none")
    assert not cache.serves("pruning=l2,pruning.keep_ratio=0.3")
    file.write_text(json.dumps({"strategy": "l2", "keep_ratio": 0.2}))
    assert not cache.serves(f"pruning={file}")
    file.write_text(json.dumps({"strategy": "l2", "keep_ratio": 0.1}))
    assert not cache.serves(f"pruning={file}")
    for arguments in ("", "pruning=none", "pruning=l2,pruning.keep_ratio=0.3", f"pruning={file}"):
        assert cache.serves(arguments), arguments
    monkeypatch.setattr(integration, "__version__", "another version")
    assert not cache.serves("pruning=none")


def test_served_answers_are_not_measured(cache: Cache) -> None:
    fresh, served = cache.run("pruning=l2"), cache.run("pruning=l2")
    said = [[line["resps"] for line in results["samples"][lmms.SCENES]] for results in (fresh, served)]
    assert said[0] == said[1]
    assert served["pruning"]["strategies"] == fresh["pruning"]["strategies"]
    assert served["pruning"]["samples"] == {"total": 0, "with_images": 0, "pruned": 0}
    assert served["pruning"]["visual_tokens"] == {"before": 0, "after": 0}


def test_a_failed_run_leaves_nothing_to_serve(cache: Cache, tmp_path: Path) -> None:
    lmms.write_tasks(tmp_path, flat=False)
    for _ in range(2):
        with pytest.raises(PruningError, match="not one token was cut"):
            cache.run("pruning=vprune,pruning.cosine_threshold=1,pruning.chi2_threshold=0", "pope")
    assert [stats["hits"] for stats in cache.stats] == [0, 0]
