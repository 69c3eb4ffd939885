"""Calls, copies and wrappers: whoever calls an attached model, copies it, wraps it or trains it (docs/modes.md)."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from models import NEW, PLACEHOLDER, Tiny, build_hf, picture, prompts, tiny
from paths import ROOT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, CLIPVisionModel

import vtp_plugin as vtp
from vtp_plugin.config import resolve
from vtp_plugin.errors import PruningError
from vtp_plugin.surgery.undo import Override

MODES = (ROOT / "docs" / "modes.md").read_text()
CASES = ["none", "l2", "stride", "fastv"]
SAVED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a holder": lambda model: copy.deepcopy(nn.ModuleDict({"held": model}))["held"],
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.fixture(params=["llava_hf", "llava"])
def host(request: pytest.FixtureRequest) -> Tiny:
    if request.param == "llava":
        pytest.importorskip("llava")
    return tiny(request.param)


def test_every_row_of_the_table_has_its_test():
    table = MODES.split("## Calls, copies, wrappers")[1].split("\n\n")[1]
    named = [line.strip("|").split("|")[-1].strip() for line in table.splitlines()[2:]]
    mine = [name for name in globals() if name.startswith("test_") and "row_of_the_table" not in name]
    assert named == mine


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_threads_get_their_own_answers(host: Tiny, case: str):
    rows = [[[1, 5 + i, picture(i, 0.3), 11 + i, 12, 40 + i]] for i in range(4)] + [[[1, 17, 18, 19]]]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = torch.stack(host.generate(rows[number % len(rows)], max_new_tokens=4).logits)

    with host.prune(case):
        alone = [torch.stack(host.generate(row, max_new_tokens=4).logits) for row in rows]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(2 * len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2 * len(rows)
    assert all(logits.allclose(alone[number % len(rows)], atol=1e-4) for number, logits in found.items())


def test_an_encoder_in_threads():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    images, found = torch.randn(6, 1, 3, 32, 32), {}

    def work(number: int) -> None:
        found[number] = model(images[number]).pooler_output

    with torch.no_grad(), vtp.prune(model, "l2"):
        alone = [model(image).pooler_output for image in images]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(images))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(found[number].allclose(one, atol=1e-5) for number, one in enumerate(alone))


@torch.no_grad()
def test_a_call_inside_a_call_is_its_own():
    """A logits processor that asks the same pruned model about another picture."""
    host = tiny("llava_hf")
    first, other = host.inputs(prompts("single")), host.inputs([[1, picture(9), 30, 31]])
    with host.prune("stride") as pruned:
        wanted, alone = host.generate(prompts("single")).logits, host.model(**other).logits
        inner = []

        class Asks:
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                inner.append(host.model(**other).logits)
                return scores

        options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW, "do_sample": False}
        answer = host.model.generate(**first, logits_processor=[Asks()], **options)
        assert pruned.call is None
    assert all(logits.equal(alone) for logits in inner)
    assert all(a.equal(b) for a, b in zip(answer.logits, wanted, strict=True))


@pytest.mark.parametrize("case", ["none", "l2", "stride", "fastv"])
@torch.no_grad()
def test_detaching_waits_for_the_call(host: Tiny, case: str):
    """A `with` block that ends while a thread still answers, as streamers are used; and a processor that detaches."""
    whole = host.forward(prompts("single")).logits
    found, begun = [], threading.Event()

    class Slow:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            begun.set()
            time.sleep(0.1)
            return scores

    class Detaches:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            with pytest.raises(PruningError, match="detach when the call is over"):
                pruned.detach()
            return scores

    with host.prune(case) as pruned:
        wanted = host.generate(prompts("single")).logits
        inside = host.generate(prompts("single"), logits_processor=[Detaches()]).logits
        thread = threading.Thread(
            target=lambda: found.append(host.generate(prompts("single"), logits_processor=[Slow()]).logits)
        )
        thread.start()
        assert begun.wait(60)
    thread.join()
    for logits in (inside, found[0]):
        assert all(a.equal(b) for a, b in zip(logits, wanted, strict=True))
    assert host.forward(prompts("single")).logits.equal(whole)


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", SAVED)
@pytest.mark.parametrize("case", ["l2", "vprune+stride", "fastv"])
@torch.no_grad()
def test_a_copy_is_an_unpruned_model_of_its_own(case: str, way: str):
    host = build_hf("sdpa")  # never called: transformers puts hooks on a model that no pickle holds
    first = host.inputs(prompts("single"))
    whole, clean = tiny("llava_hf").model(**first).logits, set(vars(host.model))
    with host.prune(case) as pruned:
        twin = SAVED[way](host.model)
        assert set(vars(twin)) == clean
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
        assert twin(**first).logits.equal(whole)
        assert twin.generate(**first, max_new_tokens=2, do_sample=False).shape[1] == first["input_ids"].shape[1] + 2
        assert not pruned.events
        fresh = SAVED[way](host.model)
        wanted = host.model(**first).logits
        for weights in twin.parameters():
            weights.zero_()
        assert not twin(**first).logits.any()
        assert host.model(**first).logits.equal(wanted)
        with vtp.prune(fresh, case, processor=host.processor) as again:
            assert again.model(**first).logits.equal(wanted)
    assert host.model(**first).logits.equal(whole)


@torch.no_grad()
def test_a_copy_of_a_part_computes_with_its_own_weights():
    host = build_hf("sdpa")
    pixels = host.inputs(prompts("single"))["pixel_values"]
    with host.prune("l2"):
        for part, arguments in ((host.tower, (pixels,)), (host.projector, (torch.randn(1, 4, 32),))):
            twin = copy.deepcopy(part)
            for weights in twin.parameters():
                weights.zero_()
            output = twin(*arguments)
            assert not (output if isinstance(output, Tensor) else output.last_hidden_state).any()


@pytest.mark.parametrize("way", ["peft", "compiled"])
@torch.no_grad()
def test_a_copy_of_a_wrapper_is_a_wrapper(way: str):
    """Wrappers hand on attributes of the model inside, its way of being copied among them; nothing need be traced."""
    host = build_hf("sdpa")
    first = host.inputs(prompts("single"))
    if way == "peft":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        wrapper = peft.get_peft_model(host.model, lora).eval()
    else:
        wrapper = torch.compile(host.model, backend="eager")
    whole = host.model(**first).logits
    with host.prune("stride"), torch.compiler.set_stance("force_eager"):
        twin = copy.deepcopy(wrapper)
        assert type(twin) is type(wrapper)
        assert twin(**first).logits.allclose(whole, atol=1e-4)
        for weights in twin.parameters():
            weights.zero_()
        assert not twin(**first).logits.any()
    assert host.model(**first).logits.equal(whole)


@torch.no_grad()
def test_two_models_share_their_parts():
    one, two = build_hf("sdpa"), build_hf("sdpa")
    first = one.inputs(prompts("batch"))
    whole = one.model(**first).logits
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(two.model.model, name, getattr(one.model.model, name))
    two.model.lm_head = one.model.lm_head
    for names in (("l2", "stride"), ("fastv", "l2"), ("stride", "fastv")):
        alone = []
        for host, name in zip((one, two), names, strict=True):
            with host.prune(name):
                alone.append(host.model(**first).logits)
        with one.prune(names[0]), two.prune(names[1]) as second:
            assert all(h.model(**first).logits.equal(a) for h, a in zip((one, two), alone, strict=True))
            second.detach()
            assert one.model(**first).logits.equal(alone[0])
            with pytest.raises(PruningError, match="the language model was called directly"):
                two.model(**first)
        assert all(host.model(**first).logits.equal(whole) for host in (one, two))


# -- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_hooks_of_accelerate_put_on_top_stay(case: str):
    hooks = pytest.importorskip("accelerate.hooks")
    host, counted = build_hf("sdpa"), []

    class Count(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            counted.append(module)
            return args, kwargs

    first = host.inputs(prompts("single"))
    whole = host.model(**first).logits
    pruned = host.prune(case)
    wanted = host.model(**first).logits
    for module in (host.model, host.model.model, host.tower):
        hooks.add_hook_to_module(module, Count())
    assert host.model(**first).logits.equal(wanted)
    counted.clear()
    pruned.detach()
    assert host.model(**first).logits.equal(whole)
    assert len(counted) == 3
    for module in (host.model, host.model.model, host.tower):
        hooks.remove_hook_from_module(module)
    assert host.model(**first).logits.equal(whole)
    with host.prune(case):
        assert host.model(**first).logits.equal(wanted)
    assert host.model(**first).logits.equal(whole)


@pytest.fixture
def fresh_accelerate():
    """accelerate without the state of other tests: its precision is a process's, and whoever asks first sets it."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def test_accelerators_autocast_stays(fresh_accelerate: ModuleType):
    accelerate = fresh_accelerate
    host = build_hf("sdpa")
    first = host.inputs(prompts("single"))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    pruned = host.prune("stride")
    model = accelerator.prepare(host.model)
    during = model(**first).logits
    pruned.detach()
    after = model(**first).logits
    assert during.dtype is after.dtype is torch.float32  # its outputs are converted back
    assert not after.equal(during)
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert not plain(**first).logits.equal(after)  # no autocast any more


def test_an_override_without_its_owner_passes_through():
    class Owner:
        def speak(self) -> str:
            return "own"

    owner = Owner()
    override = Override(owner, "speak", lambda: "ours")
    owner.speak = override
    owner.speak = lambda: override() + "!"
    override.take_back()
    assert owner.speak() == "own!"


@pytest.mark.parametrize("case", ["stride", "fastv"])
@torch.no_grad()
def test_a_model_inside_peft(case: str):
    peft = pytest.importorskip("peft")
    host = build_hf("sdpa")
    first = host.inputs(prompts("single"))
    model = peft.get_peft_model(host.model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    whole = model(**first).logits
    with vtp.prune(model, case, processor=host.processor) as pruned:
        logits = model(**first).logits
        model.generate(**first, max_new_tokens=2, do_sample=False)
        assert len(pruned.events) == 2
    with vtp.prune(model.get_base_model(), case, processor=host.processor):
        assert model(**first).logits.equal(logits)
    assert model(**first).logits.equal(whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stride", "fastv"])
@torch.no_grad()
def test_a_model_compiled_and_run_before(case: str):
    """Cut as if it had not been, or the sentence says what happened."""
    host = build_hf("sdpa")
    first = host.inputs(prompts("single"))
    with host.prune(case):
        wanted = host.model(**first).logits
    compiled = torch.compile(host.model, backend="eager")
    whole = compiled(**first).logits
    for given in (host.model, compiled):
        with vtp.prune(given, case, processor=host.processor):
            assert compiled(**first).logits.allclose(wanted, atol=1e-4)
    assert compiled(**first).logits.allclose(whole, atol=1e-4)


# -- around the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["l2", "stride", "fastv"])
@torch.no_grad()
def test_an_export_is_refused(case: str):
    host = build_hf("sdpa")
    with host.prune(case), pytest.raises(PruningError, match=r"torch\.export cannot follow what is cut"):
        torch.export.export(host.model, (), kwargs=host.inputs(prompts("single")), strict=False)


@pytest.mark.parametrize("case", ["l2", "stride", "fastv"])
@torch.no_grad()
def test_no_image_passes_unpruned(host: Tiny, case: str):
    first = host.inputs(prompts("single"))
    with host.prune(case):
        if host.family == "llava_hf":
            with pytest.raises(PruningError, match="the backbone was called directly"):
                host.model.model(**first)
            return
        arguments = (first["inputs"], None, None, None, None, first["images"])
        with pytest.raises(PruningError, match="merged into a prompt by hand"):
            host.model.prepare_inputs_labels_for_multimodal(*arguments)
        embeds = host.decoder.embed_tokens(torch.tensor([[1, 17, 18]]))
        with pytest.raises(PruningError, match="pruning needs input_ids"):
            host.model(inputs_embeds=embeds)


@pytest.mark.parametrize("case", ["l2", "stride", "fastv"])
@torch.no_grad()
def test_embeddings_given_to_the_language_model_itself_are_refused(host: Tiny, case: str):
    embeds, ids = host.decoder.embed_tokens(torch.tensor([[1, 17, 18]])), torch.tensor([[1, 17, 18]])
    wanted = host.decoder(inputs_embeds=embeds).last_hidden_state
    with host.prune(case):
        with pytest.raises(PruningError, match="the language model was called directly"):
            host.decoder(inputs_embeds=embeds)
        assert host.decoder(input_ids=ids).last_hidden_state.equal(wanted)
        if host.family == "llava_hf":  # an assistant's passes, and prompts without images, are no such thing
            host.generate(prompts("single"), **({} if case == "fastv" else {"assistant_model": host.model}))
        host.generate([[1, 17, 18, 19]])
    with host.prune("none"):
        assert host.decoder(inputs_embeds=embeds).last_hidden_state.equal(wanted)


NOTHING = ([], {}, (), None, "", 5, vtp.get_strategy("l2"), [{}], {"l2": 3}, {"strategies": []})


@pytest.mark.parametrize("spec", NOTHING, ids=str)
def test_a_specification_that_names_nothing_is_refused(spec: Any):
    with pytest.raises(PruningError) as error:
        vtp.prune(tiny("llava_hf").model, spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        {"l2": {"keep_ratio": 0.3}},
        {"strategy": "l2", "keep_ratio": 0.3},
        {"strategies": [{"strategy": "l2", "keep_ratio": 0.3}]},
        [{"l2": {"keep_ratio": 0.3}}],
    ],
    ids=str,
)
def test_values_of_dictionaries_are_not_dropped(spec: Any):
    (strategy,) = resolve(spec)
    assert (strategy.name, strategy.keep_ratio) == ("l2", 0.3)
    both = resolve({"l2": {"keep_ratio": 0.3}, "fastv": {"layer": 1}})
    assert (both[0].keep_ratio, both[1].layer) == (0.3, 1)


# -- training ---------------------------------------------------------------------------------------------------------

FEWER = {"visionzip": {"keep_tokens": 18}}  # than its default of 64, which these images do not have
MERGING = ["visionzip", "prumerge", "pooling", "tome", "sparsevlm", "stride", "fastv"]


@pytest.mark.parametrize("case", MERGING)
def test_the_vision_tower_learns(case: str):
    """Values of survivors keep their gradient; only the choice has none."""
    host = build_hf("sdpa")
    first = host.inputs(prompts("batch"))
    told = first["input_ids"].masked_fill(first["input_ids"] == PLACEHOLDER, -100)
    with host.prune(case, **FEWER.get(case, {})):
        output = host.model(**first, labels=told)
        output.loss.backward()
    for name, weights in host.tower.named_parameters():
        if "layers.0." in name and "weight" in name:
            assert weights.grad is not None, name
            assert weights.grad.abs().sum() > 0, name


def test_a_loss_of_ones_own_learns_the_same():
    host = build_hf("sdpa")
    first = host.inputs(prompts("single"))
    ids = first["input_ids"]
    told = ids.masked_fill(ids == PLACEHOLDER, -100)
    with host.prune("stride"):
        host.model(**first, labels=told).loss.backward()
        wanted = host.decoder.layers[0].self_attn.q_proj.weight.grad.clone()
        host.model.zero_grad()
        logits = host.model(**first).logits
        there = logits[0].abs().sum(-1) > 0
        cross_entropy(logits[0][there][:-1], told[0][there][1:]).backward()
    assert host.decoder.layers[0].self_attn.q_proj.weight.grad.allclose(wanted, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["l2", "visionzip", "stride", "fastv", "sparsevlm"])
def test_gradient_checkpointing_learns_the_same(case: str, reentrant: bool):
    host = build_hf("sdpa")
    first = host.inputs(prompts("batch"))
    told = first["input_ids"].masked_fill(first["input_ids"] == PLACEHOLDER, -100)

    def learned() -> dict[str, Tensor]:
        host.model.zero_grad()
        host.model(**first, labels=told).loss.backward()
        return {name: p.grad.clone() for name, p in host.model.named_parameters() if p.grad is not None}

    with host.prune(case, **FEWER.get(case, {})):
        host.model.train()
        wanted = learned()
        again(host, reentrant)
        if case in ("fastv", "sparsevlm") and type(host.decoder.layers[0]).__call__ is not nn.Module.__call__:
            with pytest.raises(PruningError, match=r"before transformers 5\.23"):
                learned()
            return
        found = learned()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5) for name in wanted)


def again(host: Tiny, reentrant: bool) -> None:
    """Gradient checkpointing, under its name of today or the one before."""
    enable = getattr(host.model, "activation_checkpointing_enable", host.model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if not getattr(host.model, "_require_grads_hooks", None):  # the reentrant kind needs inputs that have a gradient
        host.model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_merge_and_run_again_are_refused(reentrant: bool):
    host = build_hf("sdpa")
    first = host.inputs(prompts("single"))
    with host.prune("tome"):
        wanted = host.model(**first).logits
        host.model.train()
        again(host, reentrant)
        with pytest.raises(PruningError, match="gradient checkpointing runs the tower's blocks again"):
            host.model(**first)
        with torch.no_grad():
            assert host.model(**first).logits.equal(wanted)
        host.model.generate(**first, max_new_tokens=2, do_sample=False)
        host.tower.requires_grad_(False)
        host.model.disable_input_require_grads()
        host.model(**first, labels=first["input_ids"]).loss.backward()
        assert host.decoder.layers[0].self_attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("case", ["stride", "fastv"])
def test_a_fused_loss_is_refused(case: str, logits: bool, monkeypatch: pytest.MonkeyPatch):
    """As fused kernels put it in the place of the host's forward: the loss from hidden states, perhaps no logits."""
    host = build_hf("sdpa")
    first = host.inputs(prompts("single"))
    told = first["input_ids"].masked_fill(first["input_ids"] == PLACEHOLDER, -100)

    own = type(host.model).forward

    def fused(self: nn.Module, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = own(self, input_ids=input_ids, output_hidden_states=True, **kwargs)
        if labels is not None:
            made = self.lm_head(output.hidden_states[-1])
            output.loss = cross_entropy(made[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            output.logits = output.logits if logits else None
        return output

    fused.__signature__ = inspect.signature(own)
    monkeypatch.setattr(type(host.model), "forward", fused)
    whole = host.model(**first, labels=told).loss
    with host.prune(case):
        with pytest.raises(PruningError, match="computes its loss elsewhere than in loss_function"):
            host.model(**first, labels=told)
        assert host.model(**first).logits.shape[1] == told.shape[1]
    assert host.model(**first, labels=told).loss.equal(whole)


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_no_pixels_outlive_their_call(host: Tiny, case: str):
    with host.prune(case):
        first = host.inputs(prompts("single"))
        name = "pixel_values" if host.family == "llava_hf" else "images"
        pixels = weakref.ref(first[name])
        host.model.generate(**first, max_new_tokens=2, do_sample=False)
        del first
        gc.collect()
        assert pixels() is None
