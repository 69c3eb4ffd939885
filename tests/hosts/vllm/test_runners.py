"""Both of vLLM's model runners serve what the transformers path keeps and says. V2 needs Triton, which needs a GPU.

`pytest tests/hosts/vllm/test_runners.py -m gpu`, in an environment with vLLM's build for GPUs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from engines import ask, columns, engine, events
from families import IMAGE
from served import expected, folder_of, named, positions_of, requests, settings_of, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BEGINS = {"internvl": "<IMG_CONTEXT>", "internvl_chat": "<image>\n", "gemma3": "<start_of_image>"}
CASES = [
    ("qwen2_vl", settings_of("visionzip")),
    ("qwen2_5_vl", {"strategy": "pixelprune+visionzip", "pixelprune.threshold": 0.1, "visionzip.keep_ratio": 0.5}),
    ("qwen3_vl", settings_of("random")),
    ("qwen3_vl", settings_of("random") | {"positions": "compact"}),
    ("qwen3_vl_moe", {"strategy": "l2", "keep_ratio": 0.4}),
    ("internvl", settings_of("fastervlm")),
    ("internvl_chat", settings_of("fastervlm")),
    ("gemma3", settings_of("fastervlm")),  # whose pictures are seen both ways here
]
CLOSE = 2e-2  # log-probabilities, fp32 on a GPU against a CPU


@pytest.mark.parametrize("runner", ["1", "0"], ids=["V2", "V1"])
@pytest.mark.parametrize(("family", "settings"), CASES, ids=named)
def test_a_runner_serves_what_transformers_keeps(
    family: str, settings: dict[str, Any], runner: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    asked, folder = requests(), folder_of(family)
    ask_for = partial(write, picture=BEGINS[family]) if family in BEGINS else write
    wanted = expected(folder, settings, asked, ask_for)
    limits = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "trust_remote_code": "chat" in family}
    with engine(settings, folder, **limits) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner == (runner == "1")
        for request, want in zip(asked, wanted, strict=True):
            with positions_of(llm) as seen:
                (output,) = ask(llm, [request], ask_for)
            assert [index.tolist() for event in events(llm) for index in event.kept] == want["kept"]
            assert columns([output], IMAGE) == [sum(map(len, want["kept"][-len(request[0]) :]))]
            if want["positions"] is not None:
                given = torch.cat([table.cpu() for table in seen], dim=1)  # a step may follow that nobody waits for
                assert torch.equal(given[:, : want["positions"].shape[1]], want["positions"])
            answer = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
            assert [found[token].logprob for token, found in answer] == pytest.approx(want["logprobs"], abs=CLOSE)
