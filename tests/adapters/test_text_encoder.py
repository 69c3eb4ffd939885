"""`text_encoder=llm`: projected patches against the language model's embeddings of the question, restated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import families
import models
import pytest
import torch
from families import FAMILIES, Processor
from family_runs import batched, blip2, model_of, prompts_of
from reference import best, cosine, nearest

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError

numbers = families.Numbers()


def similarities(model: Any, inputs: dict[str, Any], totals: list[int]) -> list[list[float]]:
    """Per image of a single prompt, the cosine of every row with the mean embedding of the prompt's words."""
    ids = inputs["input_ids"][0]
    words = ids[ids != families.IMAGE]
    question = model.get_input_embeddings()(words).double().mean(0).tolist()
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    rows = model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs}, return_dict=True)
    rows = rows.pooler_output
    rows = torch.cat([row.flatten(0, -2) for row in rows]) if isinstance(rows, (list, tuple)) else rows.flatten(0, -2)
    newline = getattr(model.model, "image_newline", None)
    return [
        [
            float("-inf") if newline is not None and row.equal(newline) else cosine(row.double().tolist(), question)
            for row in one
        ]
        for one in rows.split(totals)
    ]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llava_onevision", "llava_next"])
@torch.no_grad()
def test_atp_keeps_what_resembles_the_question(name: str, sign: int):
    family, model = FAMILIES[name], model_of(name, "sdpa")
    prompt = family.sample(0, 2)
    inputs = batched(family, (prompt,))
    fields = {"alpha": 1.0, "relevance_sign": sign, "text_encoder": "llm", "keep_ratio": 0.3}
    with vtp.prune(model, "atp", processor=Processor(), **fields) as pruned:
        model(**inputs)
    (event,) = pruned.events
    for kept, scores in zip(event.kept, similarities(model, inputs, prompt.totals), strict=True):
        rows = [i for i, score in enumerate(scores) if score != float("-inf")]
        chosen = best([sign * scores[i] for i in rows], nearest(0.3 * len(rows)))
        assert kept.tolist() == [rows[i] for i in chosen]


@pytest.mark.parametrize("strategy", ["atp", "cdpruner", "divprune", "mmtok"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llava_onevision", "gemma3"])
@torch.no_grad()
def test_methods_that_read_the_question_run_without_a_text_tower(name: str, strategy: str):
    family, model = FAMILIES[name], model_of(name, "sdpa")
    fields = {"text_encoder": "llm"} if strategy in ("atp", "cdpruner") else {}
    inputs = batched(family, prompts_of(name, "batch"))
    with vtp.prune(model, strategy, processor=Processor(), keep_ratio=0.5, **fields) as pruned:
        model(**inputs)
    assert all(a < b for event in pruned.events for a, b in zip(event.after, event.before, strict=True))


@torch.no_grad()
def test_words_are_the_embeddings_of_each_images_own_question():
    """Of a batch whose questions are of unequal length, filled up with zeros."""
    host, seen = models.tiny("llava_hf"), []
    named = {
        "decode": staticmethod(host.processor.tokenizer.decode),
        "__call__": staticmethod(numbers),
    }
    processor = SimpleNamespace(image_processor=host.images, tokenizer=type("Numbers", (), named)())
    strategy = vtp.get_strategy("mmtok")(keep_tokens=9)
    select = strategy.select
    object.__setattr__(strategy, "select", lambda visual: seen.append(visual.words) or select(visual))
    rows = [[1, 5, models.picture(1), 8, 30, 31, 33], [1, 6, models.picture(2), 9]]
    with vtp.prune(host.model, strategy, processor=processor) as pruned:
        together = host.forward(rows).logits[:, -1]
        kept = [k for event in pruned.events for k in event.kept]
        pruned.events.clear()
        alone = torch.cat([host.forward([row]).logits[:, -1] for row in rows])
        assert all(a.equal(b) for a, b in zip(kept, [e.kept[0] for e in pruned.events], strict=True))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    embed = host.model.get_input_embeddings()
    long, short = (embed(torch.tensor([i for i in row if isinstance(i, int)])) for row in rows)
    assert torch.allclose(seen[0][0], long)
    assert torch.allclose(seen[0][1, : len(short)], short)
    assert not seen[0][1, len(short) :].any()


def test_another_question_keeps_other_tokens():
    family, model = FAMILIES["internvl"], model_of("internvl", "sdpa")
    inputs, kept = batched(family, (family.sample(0, 1),)), []
    for word in (7, 40, 99, 150):
        inputs["input_ids"][0, -1] = word
        with (
            vtp.prune(model, "atp", processor=Processor(), alpha=1.0, text_encoder="llm") as pruned,
            torch.no_grad(),
        ):
            model(**inputs)
        kept.append(pruned.events[0].kept[0].tolist())
    assert any(one != kept[0] for one in kept)


def test_the_default_is_refused_and_names_the_alternative():
    with pytest.raises(PruningError, match="text_encoder=llm compares with the language model's embeddings"):
        vtp.prune(model_of("internvl", "sdpa"), "atp", processor=Processor())
    with pytest.raises(PruningError, match=r"^atp: clip needs text_encoder=clip"):
        vtp.get_strategy("atp")(text_encoder="llm", clip="somewhere")
    with pytest.raises(PruningError, match=r"^cdpruner: text_encoder must be one of clip, llm"):
        vtp.get_strategy("cdpruner")(text_encoder="bert")
    with pytest.raises(PruningError, match="of every token, the one of BLIP-2 answers with tokens of its own"):
        vtp.prune(blip2(), "atp", processor=Processor(), text_encoder="llm")


def test_a_prompt_without_a_question_is_refused():
    family, model = FAMILIES["internvl"], model_of("internvl", "sdpa")
    inputs = batched(family, (family.sample(0, 1),))
    silent = Processor()
    silent.tokenizer = type("Silent", (), {"decode": lambda *a, **k: "", "__call__": staticmethod(numbers)})()
    with (
        vtp.prune(model, "atp", processor=silent, text_encoder="llm"),
        pytest.raises(PruningError, match="no question"),
    ):
        model(**inputs)
