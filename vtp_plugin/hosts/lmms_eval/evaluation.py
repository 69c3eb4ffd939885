"""One evaluation of one pruned model under lmms-eval: the document behind every call, and the proof at its end.

For that one run the host's `evaluate` is wrapped to add `results["pruning"]` and every sample's record, and to fail
where the host would have gone on with empty answers: whatever raises while it asks the model is remembered, wherever
that is and whoever swallows it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtp_plugin import config
from vtp_plugin.errors import PruningError, reason
from vtp_plugin.hosts.lmms_eval import status
from vtp_plugin.hosts.lmms_eval.documents import Documents, Fetched
from vtp_plugin.hosts.lmms_eval.perturb import Perturbation
from vtp_plugin.hosts.lmms_eval.proof import Seen, check, report_latency
from vtp_plugin.hosts.lmms_eval.requests import REQUESTS, by_task
from vtp_plugin.hosts.lmms_eval.settings import KEY
from vtp_plugin.hosts.wrapping import wrap
from vtp_plugin.pruning import Pruned
from vtp_plugin.reporting import gallery, summary
from vtp_plugin.reporting.gallery import Recorder
from vtp_plugin.reporting.record import record, samples_of
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.version import __version__

EACH = "VTP_GALLERY_EACH"  # of the process: a gallery for every evaluation, in its own output folder


class Run:
    """One evaluation of one pruned model: knows the document behind every call, and ends with the proof."""

    def __init__(
        self, lm: Any, pruned: Pruned, strategies: list[PruningStrategy], perturbation: Perturbation | None = None
    ) -> None:
        self.lm, self.pruned, self.strategies, self.perturbation = lm, pruned, strategies, perturbation
        self.fetched, self.seen, self.answering = Fetched(), Seen(), False
        self.gallery = Recorder.wanted(pruned, _gallery(os.environ, status.cell.get()))
        pruned.finished.append(self._finished)

    def install(self) -> None:
        """Wrap `evaluate` until it has been called for this model."""
        evaluator = importlib.import_module("lmms_eval.evaluator")
        if not hasattr(evaluator.evaluate, "_vtp"):
            wrap(evaluator, "evaluate", _dispatch)
        _waiting.append(self)

    def evaluate(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("response_cache")
        self._mark_cache(cache)
        self.lm.task_dict = Documents(self.lm.task_dict, self.fetched)
        try:
            with Undo() as undo:
                self._watch(undo, kwargs["task_dict"] if "task_dict" in kwargs else args[1])
                results = original(*args, **kwargs)
        finally:
            self.pruned.detach()
        if self.gallery is not None:
            self.gallery.write()
        everyone = gathered(self.seen)
        samples = _unpadded([sample for seen in everyone for sample in seen.samples])
        check(self.strategies, samples, everyone, cached=cache is not None)
        if results is not None:
            self._add(results, samples)
            summary.show(results[KEY], kwargs.get("cli_args"))
        return results

    def _add(self, results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """The proof, into what the host is about to write."""
        results[KEY] = self.record(samples)
        if self.perturbation is not None:
            results[KEY]["perturbation"] = self.perturbation.as_json()
        _annotate(results.get("samples") or {}, samples)

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

    # -- while the host asks the model ------------------------------------------------------------------------------

    def _watch(self, undo: Undo, tasks: Mapping[str, Any]) -> None:
        """Stand at every door through which the host comes to the model, and to what we changed on the way."""
        from lmms_eval.evaluator_utils import get_task_list

        for output in get_task_list(tasks):
            if self.perturbation is not None:
                self.perturbation.install(output.task)
            self._guard(undo, output.task, "doc_to_visual", "doc_to_text")
        for owner, names in self._doors():
            self._guard(undo, owner, *names)
        for name in REQUESTS:
            original = getattr(self.lm, name)
            undo.override(self.lm, name, lambda requests, original=original: self._asked(original, requests))

    def _doors(self) -> list[tuple[Any, Sequence[str]]]:
        """The functions inside the model's calls that raise for us."""
        processors = [(one, ["preprocess"]) for one in self.pruned.adapter.visual_processors]
        return [(self.pruned.model, ["generate", "forward"]), *processors]

    def _guard(self, undo: Undo, owner: Any, *names: str) -> None:
        """Remember what these functions raise, whoever swallows it."""
        for name in names:
            original = getattr(owner, name)
            undo.override(owner, name, lambda *args, original=original, **kwargs: self._kept(original, *args, **kwargs))

    def _kept(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception as error:
            self.seen.failure = self.seen.failure or reason(error)
            raise

    def _asked(self, original: Callable, requests: Sequence[Any]) -> list[Any]:
        """The host's requests, a task at a time: it takes a whole batch for one of its first request's task."""
        self.seen.requests += len(requests)
        self.answering = True
        try:
            return by_task(original, requests)
        finally:
            self.answering = False

    def _finished(self, call: Call) -> None:
        reports = samples_of(self.pruned, call)
        documents = self.fetched.take(len(reports))
        if len(documents) == len(reports):
            reports = [r | {"task": task, "doc_id": doc} for r, (task, doc) in zip(reports, documents, strict=True)]
            if self.gallery is not None:
                self.gallery.add(call, documents)
        elif self.answering:
            raise PruningError(
                f"the host called its model for {len(reports)} questions, but read {len(documents)} documents for "
                "them: no telling which is which; try --batch_size 1"
            )
        self.seen.samples.extend(reports)
        for event in call.events:
            self.seen.cut[event.strategy] += sum(event.before) - sum(event.after)
        status.say(status.ANSWERED, done=len(self.seen.samples), of=max(self.seen.requests, len(self.seen.samples)))


def _gallery(environment: Mapping[str, str], output: str) -> Mapping[str, str]:
    """Where this evaluation's gallery goes, in the words of `reporting.gallery`."""
    if not (environment.get(EACH) and output):
        return environment
    return {**environment, gallery.FOLDER: str(Path(output) / "gallery")}


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
