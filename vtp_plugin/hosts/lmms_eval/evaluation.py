"""One evaluation of one pruned model under lmms-eval: the document behind every call, and the proof at its end.

For that one run the host's `evaluate` is wrapped to add `results["pruning"]` and every sample's record, and to fail
where the host would have gone on with empty answers.
"""

from __future__ import annotations

import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.documents import Asked, Documents
from vtp_plugin.hosts.lmms_eval.perturb import Perturbation
from vtp_plugin.hosts.wrapping import wrap
from vtp_plugin.pruning import Pruned
from vtp_plugin.reporting.gallery import Recorder
from vtp_plugin.reporting.record import record, samples_of
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.version import __version__

KEY = "pruning"  # of our entry in the results and in every line of a sample log


class Run:
    """One evaluation of one pruned model: knows the document behind every call, and ends with the proof."""

    def __init__(
        self, lm: Any, pruned: Pruned, strategies: list[PruningStrategy], perturbation: Perturbation | None = None
    ) -> None:
        self.lm, self.pruned, self.strategies, self.perturbation = lm, pruned, strategies, perturbation
        self.asked = Asked()
        self.samples: list[dict[str, Any]] = []
        self.gallery = Recorder.wanted(pruned)
        pruned.finished.append(self._finished)

    def install(self) -> None:
        """Wrap `evaluate` until it has been called for this model."""
        evaluator = importlib.import_module("lmms_eval.evaluator")
        if not hasattr(evaluator.evaluate, "_vtp"):
            wrap(evaluator, "evaluate", _dispatch)
        _waiting.append(self)

    def evaluate(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        self._mark_cache(kwargs.get("response_cache"))
        self.lm.task_dict = Documents(self.lm.task_dict, self.asked)
        if self.perturbation is not None:
            self._perturb(kwargs["task_dict"] if "task_dict" in kwargs else args[1])
        try:
            results = original(*args, **kwargs)
        finally:
            self.pruned.detach()
        if self.gallery is not None:
            self.gallery.write()
        everyone = gathered((self.samples, self.pruned.failure and _sentence(self.pruned.failure)))
        samples = _unpadded([sample for part, _ in everyone for sample in part])
        self._check(samples, [failure for _, failure in everyone if failure])
        if results is not None:
            results[KEY] = self.record(samples)
            if self.perturbation is not None:
                results[KEY]["perturbation"] = self.perturbation.as_json()
            _annotate(results.get("samples") or {}, samples)
        return results

    def record(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The run's entry in the results; the times to first token go to the host's own throughput, too."""
        entry = record(self.pruned, samples)
        report_latency(entry)
        return entry

    def _mark_cache(self, cache: Any) -> None:
        """No answer of another configuration, version or unpruned run may be taken from the response cache."""
        if cache is not None:
            mark = cache._model_fingerprint_hash + config.fingerprint(self.strategies, __version__)
            mark += repr(self.perturbation)
            cache._model_fingerprint_hash = hashlib.sha256(mark.encode()).hexdigest()[:16]

    def _perturb(self, tasks: Mapping[str, Any]) -> None:
        from lmms_eval.evaluator_utils import get_task_list

        for output in get_task_list(tasks):
            self.perturbation.install(output.task)

    def _finished(self, call: Call) -> None:
        reports = samples_of(self.pruned, call)
        documents = self.asked.take(len(reports))
        if len(documents) == len(reports):
            reports = [r | {"task": task, "doc_id": doc} for r, (task, doc) in zip(reports, documents, strict=True)]
            if self.gallery is not None:
                self.gallery.add(call, documents)
        self.samples.extend(reports)

    def _check(self, samples: list[dict[str, Any]], failures: list[str]) -> None:
        if failures:
            raise PruningError(f"{len(failures)} process(es) met an error while generating; the first: {failures[0]}")
        images = [image for sample in samples for image in sample["images"]]
        asked = [s for s in self.strategies if not s.keeps_everything]
        if asked and images and all(image["after"] >= image["before"] for image in images):
            names = "+".join(s.name for s in asked)
            raise PruningError(f"{names}: {len(images)} images went in and not one token was cut with {asked}")


def report_latency(entry: Mapping[str, Any]) -> None:
    """Let the host's `results["throughput"]` have the times to first token that it does not measure itself.

    The host puts `avg_` in front of every name. Where its model class logs no throughput at all, ours stands in.
    """
    from lmms_eval.models.model_utils import gen_metrics

    measured = entry["latency"]
    if not measured["samples"]:
        return
    extras = {f"ttft_{name}": seconds for name, seconds in measured["ttft"].items()}
    extras |= {f"decode_per_token_{name}": seconds for name, seconds in measured["decode_per_token"].items()}
    tokens, seconds = 0, 0.0
    if not gen_metrics.get_logged_metrics_history():
        tokens, seconds = measured["new_tokens"], entry["seconds"]["total"]
        extras["total_requests"] = entry["samples"]["total"]
    gen_metrics.log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, extras)


_waiting: list[Run] = []  # runs whose model was built and not evaluated yet


def _dispatch(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """The host's `evaluate`, for a pruned model within its run."""
    lm = kwargs["lm"] if "lm" in kwargs else args[0]
    run = next((run for run in _waiting if run.lm is lm), None)
    if run is None:
        return original(*args, **kwargs)
    _waiting.remove(run)
    if not _waiting:
        importlib.import_module("lmms_eval.evaluator").evaluate = original
    return run.evaluate(original, *args, **kwargs)


def _unpadded(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the requests that the host repeats so that all processes have equally many."""
    counts = Counter((s["task"], s["doc_id"]) for s in samples if "task" in s)
    least: dict[str, int] = {}
    for (task, _), count in counts.items():
        least[task] = min(count, least.get(task, count))
    seen: Counter = Counter()
    kept = []
    for sample in samples:
        key = sample.get("task"), sample.get("doc_id")
        seen[key] += 1
        if key[0] is None or seen[key] <= least[key[0]]:
            kept.append(sample)
    return kept


def gathered(mine: Any) -> list[Any]:
    """The same object of every process of a distributed run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _annotate(logged: Mapping[str, list[dict[str, Any]]], samples: list[dict[str, Any]]) -> None:
    """Put every sample's report into its line of the sample log."""
    reports = {(s["task"], s["doc_id"]): s for s in samples if "task" in s}
    for task, lines in logged.items():
        for line in lines:
            if report := reports.get((task, line["doc_id"])):
                line[KEY] = {k: v for k, v in report.items() if k not in ("task", "doc_id")}


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, PruningError) else f"{type(error).__name__}: {error}"
