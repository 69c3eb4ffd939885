"""lmms-eval's `--model vllm`: the strategies travel in vLLM's `hf_overrides`, the proof comes back with every request.

The model lives in vLLM's own processes, so nothing is attached to it here. What a request cost is what vLLM says: the
ids of the prompt that it ran, with one placeholder per visual token that was kept.
"""

from __future__ import annotations

import inspect
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.documents import Fetched
from vtp_plugin.hosts.lmms_eval.evaluation import Run
from vtp_plugin.hosts.lmms_eval.perturb import Perturbation
from vtp_plugin.hosts.lmms_eval.proof import Seen
from vtp_plugin.hosts.vllm.orphans import none_left
from vtp_plugin.hosts.vllm.plan import KEY
from vtp_plugin.reporting.record import summary
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.tiny import checkpoint

TINY_ARGUMENTS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_new_tokens": 32}
TINY_ARGUMENTS |= {"gpu_memory_utilization": 0.2}  # on a CPU: of its memory, which other programs use, too


def build(
    host: type,
    strategies: list[PruningStrategy] | None,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    perturbation: Perturbation | None,
) -> Any:
    """lmms-eval's vLLM model from its arguments, pruned if there are strategies, which `settings` describe."""
    wanted = dict(arguments)
    if wanted.get("model") == checkpoint.NAME:
        wanted = {**TINY_ARGUMENTS, **wanted, "model": str(checkpoint.resolve(layout="hf"))}
    if strategies:
        wanted["hf_overrides"] = {**_parsed(wanted.get("hf_overrides")), KEY: dict(settings)}
    with none_left() if strategies is not None else nullcontext():
        lm = host(**wanted)
    if strategies is not None:
        ServedRun(lm, strategies, perturbation).install()
    return lm


def _parsed(overrides: Any) -> dict[str, Any]:
    """What the user overrides beside, as given on a command line or in a file."""
    return json.loads(overrides) if isinstance(overrides, str) else dict(overrides or {})


class ServedRun(Run):
    """An evaluation of one model behind vLLM."""

    def __init__(self, lm: Any, strategies: list[PruningStrategy], perturbation: Perturbation | None = None) -> None:
        self.lm, self.strategies, self.pruned, self.perturbation = lm, strategies, Requests(lm), perturbation
        self.fetched, self.seen, self.answering, self.gallery = Fetched(), Seen(self.pruned.samples), False, None

    def _doors(self) -> list[tuple[Any, Sequence[str]]]:
        """The engine, and what we changed on the way to it."""
        processor = self.lm.client.renderer.get_mm_processor()
        return [(self.lm.client, ["chat", "generate"]), (processor, ["apply"])]

    def record(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The run's entry in the results; no seconds and no FLOPs, which belong to batches of several requests."""
        engine = self.lm.client.llm_engine.vllm_config
        model = {
            "family": f"vllm {self.pruned.architecture}",
            "device": engine.device_config.device_type,
            "dtype": str(engine.model_config.dtype).removeprefix("torch."),
            "tensor_parallel_size": engine.parallel_config.tensor_parallel_size,
        }
        prompts = [sample["prompt_tokens"] for sample in samples]
        total = {side: sum(prompt[side] for prompt in prompts) for side in ("before", "after")}
        return summary(config.describe(self.strategies), model, samples) | {"prompt_tokens": total}


class Requests:
    """Every request of an evaluation: which document it asks about, and what vLLM made of it."""

    def __init__(self, lm: Any) -> None:
        self.samples: list[dict[str, Any]] = []
        self.documents: deque[tuple[str, Any]] = deque()
        self.processed: deque[tuple[list[int], list[dict[str, int]]]] = deque()  # prompt ids, and counts per image
        self.known: list[Any] = []  # outputs of the last call
        self.undo = Undo()
        model = lm.client.llm_engine.model_config.hf_config
        self.architecture = model.architectures[0]
        processor = lm.client.renderer.get_mm_processor()
        self.whole = unpruned(processor.info) if getattr(model, KEY, None) else None
        self._watch(lm, "generate_until", self._asking)
        self._watch(processor, "apply", self._processing)
        for name in ("chat", "generate"):
            self._watch(lm.client, name, self._answering)

    def detach(self) -> None:
        self.undo.close()

    def _watch(self, owner: Any, name: str, around: Callable) -> None:
        original = getattr(owner, name)
        self.undo.override(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    def _asking(self, original: Callable, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """The host answers its requests in order."""
        self.documents = deque((request.arguments[4], request.arguments[3]) for request in requests)
        return original(requests, *args, **kwargs)

    def _processing(self, original: Callable, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM puts the placeholders of one request into its prompt, in this process."""
        prompt = original(inputs, *args, **kwargs)
        counts = []
        for number, place in enumerate(prompt["mm_placeholders"].get("image", ())):
            left = int(place.get_num_embeds())  # without the marks around them
            counts.append({"before": self._unpruned(inputs, number) if self.whole else left, "after": left})
        self.processed.append((list(prompt["prompt_token_ids"]), counts))
        return prompt

    def _unpruned(self, inputs: Any, number: int) -> int:
        size = inputs.mm_data_items["image"].get_image_size(number)
        return self.whole(inputs.hf_processor_mm_kwargs, image_width=size.width, image_height=size.height)

    def _answering(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Of two calls, one inside the other, the inner one knows the outputs already."""
        outputs = original(*args, **kwargs)
        if not any(output is known for output in outputs for known in self.known):
            self.known = list(outputs)
            self.samples += [self._sample(output.prompt_token_ids) | self._document() for output in outputs]
            if self.processed:
                raise PruningError("vLLM answered other prompts than it was given: their tokens cannot be counted")
        return outputs

    def _document(self) -> dict[str, Any]:
        if not self.documents:
            return {}
        task, document = self.documents.popleft()
        return {"task": task, "doc_id": document}

    def _sample(self, ids: Sequence[int]) -> dict[str, Any]:
        """One request; a prompt without pictures was not processed."""
        counted = self.processed and self.processed[0][0] == list(ids)
        images = self.processed.popleft()[1] if counted else []
        before = len(ids) + sum(image["before"] - image["after"] for image in images)
        return {"images": images, "prompt_tokens": {"before": before, "after": len(ids)}}


def unpruned(info: Any) -> Callable[..., int]:
    """How vLLM itself counts the tokens of a picture of a size, without what this package adds to its class."""
    host = next(cls for cls in type(info).__mro__ if cls.__module__.split(".")[0] == "vllm")
    count = host(info.ctx).get_num_image_tokens
    known = inspect.signature(count).parameters
    readers = {"image_processor": "get_image_processor", "processor": "get_hf_processor"}
    given = {name: getattr(info, read)() for name, read in readers.items() if name in known}
    if "mm_kwargs" not in known:
        return lambda arguments, **size: count(**size, **given)
    return lambda arguments, **size: count(**size, **given, mm_kwargs=arguments)
