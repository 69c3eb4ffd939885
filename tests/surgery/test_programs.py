"""Programs around the model: pipelines, adapters, trainers, savers, other ways of asking (docs/modes.md)."""

from __future__ import annotations

import copy
import functools
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from matrix import dear
from models import LLAMA, PLACEHOLDER, Tiny, build_hf, picture, prompts, tiny
from paths import ROOT
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, TextIteratorStreamer

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import cache

MODES = (ROOT / "docs" / "modes.md").read_text()
CASES = ["none", "l2", "stride", "fastv"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FULL = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
every_case = pytest.mark.parametrize("case", CASES)


def test_every_row_of_the_table_has_its_test():
    table = MODES.split("## Programs around the model")[1].split("\n\n")[2]
    named = [line.strip("|").split("|")[-1].strip() for line in table.splitlines()[2:]]
    mine = [name for name in globals() if name.startswith("test_") and "row_of_the_table" not in name]
    assert named == mine


def answered(host: Tiny, **kwargs: Any) -> Any:
    return host.model.generate(**host.inputs(prompts("batch")), **FULL | kwargs)


def logits_of(host: Tiny) -> Tensor:
    return host.model(**host.inputs(prompts("batch"))).logits


# -- asked by others --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> tuple[nn.Module, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vtp_plugin.tiny.checkpoint import resolve

    folder = resolve("vtp-tiny", "hf")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@every_case
@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
@torch.no_grad()
def test_pipelines(embedded: tuple[nn.Module, Any], task: str, case: str):
    """A chat, several of them in one batch, a prompt with its picture: the answers of `generate`."""
    from transformers import pipeline

    model, processor = embedded
    pictures = [Image.fromarray(picture(seed, 0.3).permute(1, 2, 0).numpy()) for seed in range(2)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "Which shapes?"}]}]
        for one in pictures
    ]
    text = processor.apply_chat_template(chats[0], add_generation_prompt=True)
    settings = {"max_new_tokens": 4, "do_sample": False}

    def alone(one: Image.Image) -> str:
        inputs = processor(images=[one], text=text, return_tensors="pt")
        answer = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(answer, skip_special_tokens=True).strip()

    with vtp.prune(model, case, processor=processor) as pruned:
        wanted = [alone(one) for one in pictures]
        pruned.events.clear()
        asked = pipeline(task, model=model, processor=processor)

        def said(**given: Any) -> list[str]:
            found = asked(**given, generate_kwargs=settings, return_full_text=False)
            return [
                one[0]["generated_text"].strip() if isinstance(one, list) else one["generated_text"].strip()
                for one in found
            ]

        assert said(text=chats[0]) == said(images=pictures[0], text=text) == wanted[:1]
        assert said(text=chats) == said(text=chats, batch_size=2) == wanted
        assert bool(pruned.events) == (case != "none")


@every_case
@torch.no_grad()
def test_a_streamer_of_another_thread(case: str):
    host = tiny("llava_hf")
    first = host.inputs(prompts("single"))
    words = SimpleNamespace(decode=lambda ids, **kwargs: "".join(f" w{int(number)}" for number in ids))
    with host.prune(case):
        wanted = host.model.generate(**first, max_new_tokens=4, do_sample=False)[0, first["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=60)
        given = {**first, "streamer": streamer, "max_new_tokens": 4, "do_sample": False}
        thread = threading.Thread(target=host.model.generate, kwargs=given)
        thread.start()
        assert "".join(streamer).split() == [f"w{number}" for number in wanted.tolist()]
        thread.join()


@pytest.mark.parametrize("case", dear(CASES, ["none", "fastv"]))
@torch.no_grad()
def test_continuous_batching_of_text(case: str):
    """It takes no pictures; prompts of words are the host's own affair."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this release batches otherwise")
    host = build_hf("sdpa")
    batching = transformers.ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=64)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=99)

    def said() -> list[Any]:
        given = {"generation_config": settings, "continuous_batching_config": batching, "warmup": False}
        return [
            one.generated_tokens for one in host.model.generate_batch([[1, 17, 18, 19], [1, 5, 9]], **given).values()
        ]

    whole = said()
    with host.prune(case):
        assert said() == whole
    assert all(whole)


@every_case
@torch.no_grad()
def test_an_assistant_that_sees_no_pictures(case: str):
    host = tiny("llava_hf")
    draft = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    draft.generation_config.pad_token_id, draft.generation_config.eos_token_id = 0, None
    first = host.inputs(prompts("single"))
    with host.prune(case):
        if case == "fastv":
            with pytest.raises(PruningError, match="assistant_model is not possible"):
                host.model.generate(**first, **FULL, assistant_model=draft)
            return
        wanted = host.model.generate(**first, **FULL).sequences
        assert host.model.generate(**first, **FULL, assistant_model=draft).sequences.equal(wanted)


@every_case
@torch.no_grad()
def test_seeds_and_scores(case: str):
    """The same seed says the same; scores of sequences, beams and returned sequences are those of their tokens."""
    host = tiny("llava_hf")
    ways = ({}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2})
    with host.prune(case):
        for way in ways:
            torch.manual_seed(3)
            one = answered(host, **way, output_scores=True)
            torch.manual_seed(3)
            assert answered(host, **way).sequences.equal(one.sequences)
            beams = getattr(one, "beam_indices", None)
            scores = host.model.compute_transition_scores(
                one.sequences, one.scores, beams, normalize_logits=beams is None
            )
            if beams is None:
                said = torch.stack([step.log_softmax(-1) for step in one.scores], 1)
                told = said.gather(2, one.sequences[:, -3:, None])[..., 0]
                torch.testing.assert_close(scores, told, **CLOSE)
            else:
                torch.testing.assert_close(scores.sum(1) / 3, one.sequences_scores, **CLOSE)


# -- adapters ---------------------------------------------------------------------------------------------------------


def lora(**more: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | more)


@every_case
@torch.no_grad()
def test_adapters_of_transformers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Added, switched off and on, saved, loaded and deleted while attached: as with the adapter there before."""
    import transformers.integrations.peft as integration

    monkeypatch.setattr(integration, "check_peft_version", lambda **kwargs: None)  # it may ask for one to come
    host, other = build_hf("sdpa"), build_hf("sdpa")
    whole = logits_of(host)

    def added(model: nn.Module) -> None:
        torch.manual_seed(3)
        model.add_adapter(lora(), "low_rank")
        model.eval()

    added(other.model)
    with other.prune(case):
        adapted = logits_of(other)
    with host.prune(case):
        wanted = logits_of(host)
        added(host.model)
        torch.testing.assert_close(logits_of(host), adapted, **CLOSE)
        host.model.disable_adapters()
        torch.testing.assert_close(logits_of(host), wanted, **CLOSE)
        host.model.enable_adapters()
        host.model.save_pretrained(tmp_path)
        fresh = build_hf("sdpa")
        with fresh.prune(case):
            fresh.model.load_adapter(str(tmp_path))
            fresh.model.eval()
            torch.testing.assert_close(logits_of(fresh), adapted, **CLOSE)
        host.model.delete_adapter("low_rank")
        torch.testing.assert_close(logits_of(host), wanted, **CLOSE)
    assert not adapted.allclose(wanted, **CLOSE)
    torch.testing.assert_close(logits_of(host), whole, **CLOSE)


@every_case
@torch.no_grad()
def test_peft_put_on_later(case: str):
    """As a wrapper around an attached model, switched off, and merged into it."""
    host, inputs = build_hf("sdpa"), tiny("llava_hf").inputs(prompts("batch"))
    with host.prune(case):
        wanted = logits_of(host)
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(host.model, lora()).eval()
        adapted = model(**inputs).logits
        assert not adapted.allclose(wanted, **CLOSE)
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs).logits, wanted, **CLOSE)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES[1:])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@torch.no_grad()
def test_virtual_tokens_are_refused(kind: str, case: str):
    peft = pytest.importorskip("peft")
    host = build_hf("sdpa")
    sizes = {"num_layers": 4, "token_dim": 32, "num_attention_heads": 4, "num_transformer_submodules": 1}
    model = peft.get_peft_model(host.model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes))
    said = "pruning needs input_ids" if kind == "PromptTuningConfig" else "behind a filled cache"
    with vtp.prune(model, case, processor=host.processor), pytest.raises(PruningError, match=said):
        model.eval()(**host.inputs(prompts("batch")))


REPLACED = {
    "l2": {"target_modules": ["patch_embedding"]},
    "tome": {"target_modules": ["k_proj"]},
    "stride": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    "fastv": {"target_modules": ["q_proj"], "modules_to_save": ["language_model"]},
}


@pytest.mark.parametrize("case", REPLACED)
@torch.no_grad()
def test_a_part_that_was_replaced_is_refused(case: str):
    """A hook on what an adapter has wrapped sees half of what the model computes: attach again, and it is right."""
    peft = pytest.importorskip("peft")
    host, other = build_hf("sdpa"), build_hf("sdpa")
    adapted = peft.get_peft_model(other.model, lora(**REPLACED[case])).eval()
    with vtp.prune(adapted, case, processor=host.processor):
        wanted = logits_of(other)
    with host.prune(case):
        before = logits_of(host)
        model = peft.get_peft_model(host.model, lora(**REPLACED[case])).eval()
        model.load_state_dict(adapted.state_dict())
        with pytest.raises(PruningError, match=r"was replaced by peft's \w+ after the model was pruned"):
            model(**host.inputs(prompts("batch")))
    with vtp.prune(model, case, processor=host.processor):
        torch.testing.assert_close(logits_of(host), wanted, **CLOSE)
    assert not wanted.allclose(before, **CLOSE)


# -- training ---------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Four prompts of unequal length, padded on the right when they meet."""

    def __init__(self, host: Tiny) -> None:
        self.rows = [{k: v[0] for k, v in host.inputs([row]).items()} for row in prompts("single") + prompts("even")]
        for row in self.rows:
            row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == PLACEHOLDER, -100)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.rows[number]


def together(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in filling.items()
    }
    return padded | {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def trained(case: str, folder: Path, **settings: Any) -> list[float]:
    """Losses and norms of gradients of two steps over four prompts each."""
    from transformers import Trainer, TrainingArguments

    host = build_hf("sdpa")
    fixed = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "report_to": [], "use_cpu": True}
    fixed |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "remove_unused_columns": False}
    with host.prune(case):
        if settings.get("gradient_checkpointing_kwargs", {}).get("use_reentrant"):
            host.model.enable_input_require_grads()
        arguments = TrainingArguments(str(folder), **fixed | settings)
        trainer = Trainer(host.model, arguments, train_dataset=Rows(host), data_collator=together)
        trainer.train()
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in ("loss", "grad_norm")]


@functools.cache
def trained_at_once(case: str) -> list[float]:
    """Two steps of one batch of four."""
    with TemporaryDirectory() as folder:
        return trained(case, Path(folder))


AGAIN = {"gradient_checkpointing": True}
TRAINED: dict[str, tuple[dict[str, Any], float]] = {  # settings, and how far they may be from one batch of four
    "accumulation": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 1e-3),
    "checkpointing": (AGAIN | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, 1e-3),
    "reentrant": (AGAIN | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-3),
    "bf16": (AGAIN | {"bf16": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 3e-2),
}


@pytest.mark.covering
@pytest.mark.parametrize("way", TRAINED)
@every_case
def test_trainer(case: str, way: str, tmp_path: Path):
    settings, bound = TRAINED[way]
    assert len(trained_at_once(case)) == 4
    assert trained(case, tmp_path, **settings) == pytest.approx(trained_at_once(case), rel=bound)


# -- weights ----------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_what_is_saved_is_the_unpruned_model(case: str, tmp_path: Path):
    host = build_hf("sdpa")
    host.model.save_pretrained(tmp_path / "plain")
    whole = logits_of(host)
    with host.prune(case):
        host.model.save_pretrained(tmp_path / "attached")
        wanted = logits_of(host)
        host.model.load_state_dict(host.model.state_dict())
        assert logits_of(host).equal(wanted)
    plain, attached = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("plain", "attached"))
    assert plain == attached
    twin = type(host.model).from_pretrained(tmp_path / "attached").eval()
    assert twin(**host.inputs(prompts("batch"))).logits.equal(whole)


@every_case
@torch.no_grad()
def test_other_precisions_and_vocabularies(case: str):
    """`to`, `half`, `double`, and more rows of embeddings, while attached: as if attached afterwards."""
    host = build_hf("sdpa")
    first = host.inputs(prompts("batch"))
    real = first["attention_mask"].bool()

    def outcome() -> Tensor:
        pixels = first["pixel_values"].to(host.model.dtype)
        return host.model(**{**first, "pixel_values": pixels}).logits[real]

    changes = (
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.float().cpu(),
        lambda model: model.resize_token_embeddings(120),
    )
    for change in changes:
        pruned = host.prune(case)
        before = outcome()
        change(host.model)
        found = outcome()
        pruned.detach()
        with host.prune(case):
            assert outcome().equal(found)
        assert found.shape[1] >= before.shape[1]
    assert found.shape[1] == 120


@every_case
@torch.no_grad()
def test_autocast_and_inference_mode(case: str):
    host = tiny("llava_hf")
    with host.prune(case):
        wanted = answered(host)
        with torch.inference_mode():
            found = answered(host)
            assert all(a.equal(b) for a, b in zip(found.logits, wanted.logits, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            low = answered(host)
            again = host.model(**host.inputs(prompts("batch"))).logits
    assert low.logits[0].allclose(again[:, -1].float(), rtol=0.05, atol=0.05)
    assert again.dtype is torch.bfloat16


@every_case
@torch.no_grad()
def test_spread_over_devices_later(case: str, tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    host = build_hf("sdpa")
    first, whole = host.inputs(prompts("batch")), logits_of(host)
    with host.prune(case):
        wanted = answered(host)
        assert nn.DataParallel(host.model)(**first).logits[:, -1].allclose(wanted.logits[0], **CLOSE)
        parts = {f"model.{name}": "disk" for name, _ in host.model.model.named_children()} | {"lm_head": "cpu"}
        accelerate.dispatch_model(host.model, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        found = answered(host)
        assert all(a.allclose(b, **CLOSE) for a, b in zip(found.logits, wanted.logits, strict=True))
    torch.testing.assert_close(logits_of(host), whole, **CLOSE)


# -- the handle -------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_a_copy_of_the_handle_is_refused(case: str):
    """Of a model and its copy, each attached, one is detached without the other."""
    host = build_hf("sdpa")
    first, whole = host.inputs(prompts("batch")), logits_of(host)
    pruned = host.prune(case)
    wanted, twin = logits_of(host), copy.deepcopy(host.model)
    with pytest.raises(PruningError, match="copy the model, and prune the copy"):
        copy.deepcopy(pruned)
    again = vtp.prune(twin, case, processor=host.processor)
    pruned.detach()
    assert logits_of(host).equal(whole)
    assert twin(**first).logits.equal(wanted)
    assert cache.of_output(twin(**first, use_cache=True)).get_seq_length() == first["input_ids"].shape[1]
    again.detach()
    assert twin(**first).logits.equal(whole)
