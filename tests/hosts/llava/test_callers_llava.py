"""Ways of calling the authors' package, whose columns are those of the merged prompt (docs/modes.md)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Processor
from family_runs import anyres_inputs, anyres_model
from models import N, Tiny, picture, prompts, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from vtp_plugin import PruningStrategy, Stage, VisualTokens, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import cache

pytest.importorskip("llava")

CASES = {"none": {}, "l2": {}, "stride": {"positions": "original"}, "fastv": {}, "pyramiddrop": {}}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FULL = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def host(case: str) -> Any:
    """The package's model, pruned; its own default pads generation's rows on the left, and so does this one."""
    host = tiny("llava")
    with host.prune(case, **CASES[case]), torch.no_grad():
        yield host


def held(host: Tiny, stored: Any) -> dict[str, Any]:
    return {cache.name_in(inspect.signature(host.model.forward).parameters): stored}


def generated(host: Tiny, kind: str, **kwargs: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": 3} | FULL | kwargs
    return host.model.generate(**host.inputs(prompts(kind)), **settings)


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_a_loop_of_ones_own(host: Tiny, kind: str):
    told = generated(host, kind)
    output, seen = host.forward(prompts(kind), use_cache=True), []
    there = output.logits.abs().sum(-1) > 0
    stored, length = cache.of_output(output), cache.of_output(output).get_seq_length()
    mask = torch.ones(len(there), length, dtype=torch.long)
    for row, prompt in enumerate(prompts(kind)):  # what is padding in the merged prompt
        words = sum(not isinstance(part, Tensor) for part in prompt)
        images = len(prompt) - words
        if len(there) > 1:
            each = (length - 6) // 2 if images else 0  # the longest row: two images and six words
            mask[row, : length - words - each * images] = 0
    seen.append(output.logits[:, -1])
    for _ in range(2):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = host.model(seen[-1].argmax(-1)[:, None], attention_mask=mask, **held(host, stored))
        seen.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(seen), torch.stack(told.logits), **CLOSE)


def test_a_copy_of_a_cache_and_strangers(host: Tiny, case: str):
    output = host.forward(prompts("single"), use_cache=True)
    stored, token = cache.of_output(output), output.logits[:, -1].argmax(-1)[:, None]
    twin = copy.deepcopy(stored)
    step = host.model(token, **held(host, stored)).logits
    torch.testing.assert_close(host.model(token, **held(host, twin)).logits, step, **CLOSE)
    if case == "none":
        return
    stored._vtp_turn.owner = -1
    with pytest.raises(PruningError, match="pruned otherwise"):
        host.model(token, **held(host, stored))


def test_guidance(host: Tiny):
    plain, negative = generated(host, "single"), torch.tensor([[1, 17, 18, 19]])
    guided = generated(host, "single", guidance_scale=1.7, negative_prompt_ids=negative)
    torch.testing.assert_close(guided.logits[0], plain.logits[0], **CLOSE)
    token = guided.sequences[:, :1]
    for step, ids in enumerate((negative, torch.cat([negative, token], 1))):
        with_image, without = guided.logits[step].log_softmax(-1), host.model(ids).logits[:, -1].log_softmax(-1)
        torch.testing.assert_close(guided.scores[step], 1.7 * (with_image - without) + without, **CLOSE)


def test_limits_count_the_whole_prompt(host: Tiny):
    """A limit of the merged prompt and four: the prompt as it is without pruning, 7 words and 36 patches."""
    length = sum(36 if isinstance(part, Tensor) else 1 for part in prompts("single")[0])
    limits = {"max_length": length + 4, "do_sample": False, "pad_token_id": 0}
    inputs = host.inputs(prompts("single"))
    answer = host.model.generate(**inputs, **limits)
    assert answer.shape[1] == 4
    assert host.model.generate(**inputs, generation_config=GenerationConfig(**limits)).equal(answer)
    ending = {**limits, "eos_token_id": answer[0, 0].item()}
    later = host.model.generate(**inputs, **ending, min_length=length + 2)
    assert (later[0, :2] != answer[0, 0]).all()
    assert host.model.generate(**inputs, **ending, min_length=length).shape[1] == 1
    own = copy.deepcopy(host.model.generation_config)
    try:
        host.model.generation_config.max_length = length + 2
        assert host.model.generate(**inputs, do_sample=False).shape[1] == 2
    finally:
        host.model.generation_config = own


def test_the_loss_is_over_what_is_left(host: Tiny):
    inputs = host.inputs(prompts("single"))
    ids = inputs.pop("inputs")
    output = host.model(input_ids=ids, **inputs, labels=ids.masked_fill(ids < 0, -100))
    words = int((ids[0] < 0).nonzero())  # before the image; what is behind it ends the prompt
    behind = ids[0, words + 1 :]
    logits = torch.cat([output.logits[0, : words - 1], output.logits[0, -len(behind) - 1 : -1]])
    told = torch.cat([ids[0, 1:words], behind])
    torch.testing.assert_close(output.loss, cross_entropy(logits, told), **CLOSE)


@dataclass(kw_only=True)
class First(PruningStrategy):
    """Between two decoder layers, keep the first tokens: the last one is the first to go."""

    name, stage, paper, decoder_layer = "first", Stage.LLM, "none", 2

    def score(self, visual: VisualTokens) -> Tensor:
        return -torch.arange(visual.tokens.shape[1]).expand(visual.tokens.shape[:2]).float()


@torch.no_grad()
def test_prompts_of_a_batch_that_end_with_a_picture():
    """The longest row loses nothing, so others are filled up with what they lost; the last token says what comes."""
    host, pictures = tiny("llava"), [picture(seed) for seed in range(4)]
    rows = [[1, 5, pictures[0], 9, pictures[1]], [1, *range(10, 84)], [1, 7, pictures[2], 8], [1, 21, pictures[3]]]
    with host.prune(First(keep_ratio=0.3)) as pruned:
        together = torch.stack(host.generate(rows).logits)
        assert sorted(before for event in pruned.events for before in event.before) == [N - 1, N - 1, N, N]
        for number, row in enumerate(rows):
            alone = torch.stack(host.generate([row]).logits)
            torch.testing.assert_close(together[:, number], alone[:, 0], **CLOSE)
            torch.testing.assert_close(host.forward([row]).logits[:, -1], alone[0], **CLOSE)


@contextmanager
def truncating(model: nn.Module, length: int) -> Iterator[None]:
    """While open, the package truncates merged prompts, as released checkpoints let it."""
    model.config.tokenizer_model_max_length = length
    try:
        yield
    finally:
        del model.config.tokenizer_model_max_length


@pytest.mark.parametrize("shown", [1, 20, N])
@torch.no_grad()
def test_a_picture_that_the_package_truncates(shown: int):
    """What strategies see of it is what the prompt shows, in a batch as alone; limits count the truncated prompt."""
    host, whole = tiny("llava"), [1, 5, picture(0), 9, picture(1), 11, 12]
    rows, length = [whole, [1, 21, picture(2), 22, 23]], 3 + N + shown
    limits = {"max_length": length + 3, "max_new_tokens": None}
    with truncating(host.model, length), host.prune(First(keep_ratio=0.5)) as pruned:
        alone = [host.generate([row], **limits).logits for row in rows[:1]]
        told = {n: before for event in pruned.events for n, before in zip(event.images, event.before, strict=True)}
        assert told == {0: N} | ({1: shown - 1} if shown > 1 else {})  # its last token is not judged
        together = torch.stack(host.generate(rows, **limits).logits)
    assert len(alone[0]) == len(together) == 3
    torch.testing.assert_close(together[:, 0], torch.stack(alone[0])[:, 0], **CLOSE)


@torch.no_grad()
def test_tiles_that_end_a_prompt(tmp_path: Path):
    """The last token is kept, a newline or not; of a truncated picture those rows are judged that are shown."""
    model, inputs = anyres_model(str(tmp_path)), anyres_inputs(slice(1, 2))
    inputs |= {"inputs": inputs["inputs"][:, -7:-3], "attention_mask": inputs["attention_mask"][:, -7:-3]}  # 3 words
    judged = {}
    for merge in ("spatial_unpad", "spatial"):
        model.config.mm_patch_merge_type = merge
        for shown in (1000, 30):
            with truncating(model, 3 + shown), prune(model, First(keep_ratio=0.3), processor=Processor()) as pruned:
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
            ((judged[merge, shown],),) = (event.before for event in pruned.events)
    assert judged == {
        ("spatial_unpad", 1000): 32,  # and four newlines, the last of which says what comes next
        ("spatial_unpad", 30): 27,  # two newlines, and the last row
        ("spatial", 1000): 3 * 16 - 1,
        ("spatial", 30): 29,
    }
