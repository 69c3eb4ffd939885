"""The signals of the llm stage."""

from __future__ import annotations

from torch import Tensor

from vtp_plugin.signals.declaration import Tap, signal
from vtp_plugin.signals.early import CONTENT
from vtp_plugin.signals.synthetic import absolute_sums, attention_rows, fingerprints
from vtp_plugin.signals.views import LayerView
from vtp_plugin.stages import Stage


@signal(
    "last_query_attention",
    Stage.LLM,
    "[B, N] fp32: attention of the last prompt token in the layer before the cut, mean over heads",
    taps=Tap.LAYER,
    sample=attention_rows,
)
def last_query_attention(at: LayerView) -> Tensor:
    return at.reading.last_row()[at.sample, at.image]


@signal(
    "next_query_attention",
    Stage.LLM,
    "[B, N] fp32: the same in the layer behind the cut, before cutting",
    taps=Tap.BEHIND,
    sample=attention_rows,
)
def next_query_attention(at: LayerView) -> Tensor:
    return at.behind().last_row()[at.sample, at.image]


@signal(
    "text_attention",
    Stage.LLM,
    "[B, T, N] fp32: attention of every text token behind the image in the layer before the cut, mean over heads",
    taps=Tap.LAYER,
    sample=attention_rows,
)
def text_attention(at: LayerView) -> Tensor:
    return at.reading.rows(at.sample, at.text)[:, at.image]


@signal(
    "head_attention",
    Stage.LLM,
    "[B, H, T, N] fp32: the same of every head",
    taps=Tap.LAYER,
    sample=attention_rows,
)
def head_attention(at: LayerView) -> Tensor:
    return at.reading.head_rows(at.sample, at.text)[..., at.image]


@signal(
    "rotary_bias",
    Stage.LLM,
    "[B, T, N] fp32: logits of all-ones queries and keys at the places of both",
    taps=Tap.LAYER,
)
def rotary_bias(at: LayerView) -> Tensor:
    return at.reading.rotary_bias(at.sample, at.text)[:, at.image]


@signal(
    "self_attention",
    Stage.LLM,
    "[B, N] fp32: attention from the image's own tokens, max over heads, mean over them",
    taps=Tap.LAYER,
    sample=attention_rows,
)
def self_attention(at: LayerView) -> Tensor:
    return at.reading.strongest(at.sample, at.image)[at.image] / len(at.image)


@signal(
    "cross_attention",
    Stage.LLM,
    "[B, N] fp32: attention from the text behind the image, max over heads, sum over it",
    taps=Tap.LAYER,
    sample=attention_rows,
)
def cross_attention(at: LayerView) -> Tensor:
    return at.reading.strongest(at.sample, at.text)[at.image]


@signal("values", Stage.LLM, "[B, H, N, d] fp32: values of the layer before the cut, of every head", taps=Tap.LAYER)
def values(at: LayerView) -> Tensor:
    return at.reading.values(at.sample, at.image)


@signal(
    "outputs",
    Stage.LLM,
    "[B, H, T, d] fp32: what attention makes of all values for every text token behind the image, of every head",
    taps=Tap.LAYER,
)
def outputs(at: LayerView) -> Tensor:
    return at.reading.outputs(at.sample, at.text)


@signal("entry", Stage.LLM, "[B, M, D]: embeddings of the tokens that the strategy saw first", taps=Tap.ENTRY)
def entry(at: LayerView) -> Tensor:
    return at.entry[at.sample, at.first]


@signal("text_entry", Stage.LLM, "[B, T, D]: embeddings of the text behind the image", taps=Tap.ENTRY)
def text_entry(at: LayerView) -> Tensor:
    return at.entry[at.sample, at.words]


@signal(
    "key_norms",
    Stage.LLM,
    "[B, N] fp32: L1 norms of the keys of the layer before the cut, all heads",
    taps=Tap.LAYER,
    sample=absolute_sums,
)
def key_norms(at: LayerView) -> Tensor:
    return at.reading.norms(at.sample)[at.image]


@signal("text_key_norms", Stage.LLM, "[B, T] fp32: the same of that text", taps=Tap.LAYER, sample=absolute_sums)
def text_key_norms(at: LayerView) -> Tensor:
    return at.reading.norms(at.sample)[at.text]


@signal("normed", Stage.LLM, "[B, N, D]: tokens after the language model's final norm")
def normed(at: LayerView) -> Tensor:
    return at.norm(at.hidden[at.sample, at.image])


@signal("text_normed", Stage.LLM, "[B, T, D]: the same of that text")
def text_normed(at: LayerView) -> Tensor:
    return at.norm(at.hidden[at.sample, at.text])


@signal("fingerprint", Stage.LLM, CONTENT, taps=Tap.CONTENT, sample=fingerprints)
def image_fingerprint(at: LayerView) -> tuple[int, ...]:
    return at.fingerprint
