"""Ask a vision-language model in transformers' format one question: the embedded LLaVA, or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtp_plugin.adapters.clip import quietly
from vtp_plugin.errors import PruningError, one_line
from vtp_plugin.hosts.transformers.checkpoints import refuse_checkpoint
from vtp_plugin.strategy import PruningStrategy

NEW_TOKENS = 16


def load(name: str = "vtp-tiny", strategies: Sequence[PruningStrategy] = ()) -> tuple[Any, Any]:
    """Model and processor, on CUDA where there is one. PruningError, before weights, for strategies that do not fit."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vtp_plugin.tiny.checkpoint import NAMES, refuse_alike, resolve

    refuse_alike(name)
    path = str(resolve(name, "hf")) if name in NAMES else name
    refuse_checkpoint(strategies, path)
    cuda = torch.cuda.is_available()
    try:
        with quietly():
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float16 if cuda else torch.float32)
            processor = AutoProcessor.from_pretrained(path)
    except Exception as error:  # whatever a damaged or foreign checkpoint makes the host raise
        said = one_line(str(error) or type(error).__name__)
        raise PruningError(f"cannot load a vision-language model from '{name}': {said}") from None
    return model.eval().to("cuda" if cuda else "cpu"), processor


def answer(model: Any, processor: Any, picture: Any, question: str) -> str:
    """The model's greedy answer to a question about a PIL image."""
    return answers(model, processor, [picture], [question])[0]


def answers(model: Any, processor: Any, pictures: Sequence[Any], questions: Sequence[str]) -> list[str]:
    """The model's greedy answers to as many questions, one about each PIL image, in one batch."""
    if not getattr(processor, "chat_template", None):
        raise PruningError(f"{type(processor).__name__} has no chat template, so no question can be put to the model")
    texts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    padding = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
    inputs = processor(images=list(pictures), text=texts, return_tensors="pt", **padding).to(model.device, model.dtype)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    said = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]
