"""docs/modes.md, cell by cell: a mode runs and equals the slow reference, or is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Processor
from family_runs import batched, generated, model_of, prompts_of
from models import Tiny, prompts, tiny
from paths import ROOT
from promises import CASES, CLOSE, check_answer, expected, strategies
from torch import nn

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError

TABLE = (ROOT / "docs" / "modes.md").read_text().split("\n\n")[2]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 2},
    "returned sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams with returned sequences": {"num_beams": 3, "num_return_sequences": 2},
    "use_cache=False": {"use_cache": False},
    "assisted decoding": {"assistant_model": None},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "static cache": {"cache_implementation": "static"},
}
LIKE_GREEDY = ("greedy", "use_cache=False", "assisted decoding", "prompt lookup", "static cache")


def cells() -> list[Any]:
    """(mode, case, what the table says) for both columns."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines()[2:]]
    return [
        pytest.param(mode, case, said, id=f"{mode}-{case}")
        for mode, *both in rows
        for case, said in zip(("stride", "fastv"), both, strict=True)
        if mode != "compiled decode"
    ]


def call(host: Tiny, mode: str) -> Any:
    """The model's output in one mode."""
    rows = prompts("single")
    if mode in MODES:
        arguments = dict(MODES[mode])
        if "assistant_model" in arguments:
            arguments["assistant_model"] = host.model
        return host.generate(rows, **arguments)
    inputs = host.inputs(rows)
    ids = inputs["input_ids"]
    if mode == "labels":
        return host.forward(rows, labels=ids.masked_fill(ids == 90, -100))
    if mode.startswith("a cache"):
        cache = host.forward([[1, 17, 18, 19]], use_cache=True).past_key_values
        return host.forward(rows, padded=False, past_key_values=cache)
    if mode == "inputs_embeds":
        del inputs["input_ids"]
        return host.model(**inputs, inputs_embeds=host.decoder.embed_tokens(ids))
    where = {"position_ids": torch.arange(ids.shape[1])[None]} if mode.startswith("position_ids") else {}
    return host.model(**inputs, **where)


def test_the_table_names_every_mode():
    told = {param.values[0] for param in cells()}
    assert told >= set(MODES) | {"plain forward", "labels"}
    assert len(cells()) == 2 * len(told)


@pytest.mark.parametrize(("mode", "case", "said"), cells())
@torch.no_grad()
def test_a_cell_of_the_table(mode: str, case: str, said: str):
    host = tiny("llava_hf")
    with host.prune(strategies(host, case)) as pruned:
        if said != "yes":
            with pytest.raises(PruningError) as error:
                call(host, mode)
            assert said.removeprefix("no: ") in str(error.value)
            assert "\n" not in str(error.value)
            return
        output = call(host, mode)
    (slow,) = expected(host, case, "single", pruned.events)
    assert {event.strategy for event in pruned.events} == {name for name, _ in CASES[case]}
    if mode in LIKE_GREEDY:
        check_answer(output, [slow])
    elif mode not in MODES:
        assert output.logits[0, -1].allclose(slow.logits[0], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_compiled_decode_has_one_graph(name: str, positions: str):
    from torch._dynamo import reset
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    family, model = FAMILIES[name], FAMILIES[name].build("sdpa")
    compiled = CompileConfig(fullgraph=False, mode=None, backend="eager")
    compiled._compile_all_devices = True
    reset()
    counters.clear()
    with vtp.prune(model, "stride", keep_ratio=0.5, positions=positions):
        inputs = batched(family, prompts_of(name, "single"))
        plain = generated(model, dict(inputs)).sequences
        found = generated(model, dict(inputs), cache_implementation="static", compile_config=compiled).sequences
    assert found.equal(plain)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    with vtp.prune(model, "fastv"), pytest.raises(PruningError, match="a static cache has one length"):
        generated(model, dict(inputs), cache_implementation="static", compile_config=compiled)


STAGES = ["l2", "vprune", "stride", "fastv"]


@pytest.mark.parametrize("case", STAGES)
@pytest.mark.parametrize("name", ["llava_hf", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_offloaded_modules_and_accelerates_hooks(name: str, case: str, tmp_path: Path):
    """Weights on the disk, brought in by accelerate's hooks on every module: the same logits, and both detach."""
    from copy import deepcopy

    accelerate = pytest.importorskip("accelerate")
    host = tiny("llava_hf") if name == "llava_hf" else None
    model = deepcopy(host.model if host else model_of(name, "sdpa"))
    inputs = host.inputs(prompts("batch")) if host else batched(FAMILIES[name], prompts_of(name, "batch"))
    processor = host.processor if host else Processor()
    with vtp.prune(model, case, processor=processor):
        wanted = model(**inputs).logits
    whole = model(**inputs).logits
    parts = {f"model.{part}": "disk" for part, _ in model.model.named_children()} | {"lm_head": "cpu"}
    parts |= {f"model.{name}": "cpu" for name, _ in model.model.named_parameters(recurse=False)}
    spread = accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    with vtp.prune(spread, case, processor=processor):
        assert spread(**inputs).logits.allclose(wanted, **CLOSE)
    assert spread(**inputs).logits.allclose(whole, **CLOSE)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", STAGES)
@torch.no_grad()
def test_quantised_layers(bits: int, case: str):
    """bitsandbytes' linear layers in the language model: kept as without hooks, budgets exact, detached as before."""
    bnb = pytest.importorskip("bitsandbytes")
    from models import build_hf

    host = build_hf("sdpa")
    quantise(host.decoder, bnb, bits)
    try:
        whole = host.forward(prompts("batch")).logits
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this build of bitsandbytes has no {bits}-bit layers for the CPU: {error}")
    with host.prune(strategies(host, case)) as pruned:
        output = host.generate(prompts("batch"))
        singles = [host.generate([row]) for row in prompts("batch")]
    assert pruned.events
    for row, alone in enumerate(singles):
        together = torch.stack([step[row] for step in output.logits])
        assert (together - torch.cat(list(alone.logits))).norm() < 0.05 * together.norm()
    assert host.forward(prompts("batch")).logits.equal(whole)


def quantise(module: nn.Module, bnb: Any, bits: int) -> None:
    """Replace the linear layers of a module."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            quantise(child, bnb, bits)
            continue
        sizes = (child.in_features, child.out_features)
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*sizes, bias=child.bias is not None, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, bias=child.bias is not None, quant_type="nf4")
        layer.load_state_dict(child.state_dict())
        setattr(module, name, layer.to("cpu"))


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_loglikelihood_requests_through_the_host(ratio: float):
    """The unmodified `llava` class: its loss is that of a prompt whose columns were taken out by hand."""
    pytest.importorskip("llava")
    models = pytest.importorskip("lmms_eval.models")
    import lmms
    from lmms_eval.api.instance import Instance

    arguments = f"pretrained=vtp-tiny,device_map=auto,pruning=stride,pruning.keep_ratio={ratio}"
    lm = models.get_model("llava").create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    lm.task_dict = {"scenes": {"test": [{"image": lmms.picture(1)}]}}
    request = ("Is there a red circle?", "yes", lambda doc: [doc["image"]], 0, "scenes", "test")
    seen: list[dict[str, Any]] = []
    handle = lm.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    metadata = {"task": "scenes", "doc_id": 0, "repeats": 1}
    ((loss, _),) = lm.loglikelihood([Instance("loglikelihood", request, 0, metadata)])
    handle.remove()
    pruned, told = vars(lm.model)["_vtp_pruned"], seen[0]
    (kept,) = pruned.events[-1].kept
    pruned.detach()
    start = int((told["input_ids"][0] == -200).nonzero())
    with torch.no_grad():
        *_, embeds, labels = lm.model.prepare_inputs_labels_for_multimodal(
            told["input_ids"], None, None, None, told["labels"], told["images"]
        )
        keep = torch.ones(embeds.shape[1], dtype=torch.bool)
        keep[start : start + pruned.events[-1].before[0]] = False
        keep[start + kept] = True
        expected = lm.model(inputs_embeds=embeds[:, keep], labels=labels[:, keep]).loss
    assert keep.all() == (ratio == 1)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
