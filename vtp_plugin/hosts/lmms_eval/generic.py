"""The host's classes for whatever transformers loads, `huggingface` and `async_hf_model`, where pruning is asked for.

By themselves they cannot answer with transformers 5: they look a model type up among configuration classes, load the
backbone without its head instead, and hand every processor an argument `audios`. Here they load the class that answers,
and what is empty is not handed on. `async_hf_model` is pruned with one worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from vtp_plugin import contract
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.contract import GENERIC
from vtp_plugin.surgery.undo import Undo

NAMES = ("huggingface", "async_hf_model")
MEDIA = ("images", "videos", "audios")


@contextmanager
def building(host: type, model_id: str) -> Iterator[None]:
    """While open, one of these classes loads the model that answers, and not its backbone."""
    with Undo() as undo:
        if model_id in NAMES:
            contract.check(GENERIC)
            module = import_module(host.__module__)
            undo.callback(setattr, module, "AutoModel", module.AutoModel)
            module.AutoModel = module.AutoModelForImageTextToText
        yield


def make_ready(lm: Any, model_id: str) -> None:
    """Let a model of one of these classes be called, and found by its names `model` and `processor`."""
    if model_id not in NAMES:
        return
    workers = getattr(lm, "_workers", None)
    if workers is not None:
        if len(workers) != 1:
            raise PruningError(f"{model_id} has {len(workers)} workers, pruning follows one: say worker_count=1")
        lm.model, lm.processor = workers[0].model, workers[0].processor
    _leave_out_nothing(lm.processor)


def _leave_out_nothing(processor: Any) -> None:
    """Let a processor be called with media that are not there, as if nothing was said of them."""
    cls = type(processor)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.__call__(self, *args, **{k: v for k, v in kwargs.items() if k not in MEDIA or v})

    same = {"__call__": called, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    processor.__class__ = type(cls.__name__, (cls,), same)
