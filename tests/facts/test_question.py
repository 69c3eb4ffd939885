"""The question is the user's words, under every template that hosts write prompts with, whatever the words contain."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vtp_plugin.surgery.question import framed, question_of

WORDS = [
    "is there a circle",
    "what does USER: say?",
    "is ASSISTANT: written here?",
    "which of ### Human: and ###Assistant: is it",
    "user\nassistant\nor the model",
    "who is the assistant",
    "is [INST] or [/INST] in the picture",
    "count the USER: and ASSISTANT: signs",
    "User: a Assistant: b, which?",
    "one\n\ntwo",
]
VICUNA = "A chat between a curious user and an assistant. The assistant gives answers to the user's questions. "
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {  # how the processors of transformers write one question
    "qwen": "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "internvl": "<|im_start|>user\n<IMG_CONTEXT>\n{}<|im_end|>\n<|im_start|>assistant\n",
    "onevision": "<|im_start|>user <image>\n{}<|im_end|><|im_start|>assistant\n",
    "gemma": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST]{}[/INST]",
    "mistral3": "<s>[SYSTEM_PROMPT]You are Mistral.[/SYSTEM_PROMPT][INST]{}[/INST]",
    "smolvlm": "<|im_start|>User:{}<end_of_utterance>\nAssistant:",
    "idefics3": "<|begin_of_text|>User:{}<end_of_utterance>\nAssistant:",
    "llama3": "<|begin_of_text|>"
    + LLAMA3.format("system")
    + "Be nice.<|eot_id|>"
    + LLAMA3.format("user")
    + "{}<|eot_id|>"
    "" + LLAMA3.format("assistant"),
    "llava": "<s>USER:  \n{} ASSISTANT:",
    "vicuna": "<s>" + VICUNA + "USER: <image>\n{} ASSISTANT:",
    "phi": "<|user|>\n{}<|end|>\n<|assistant|>\n",
    "glm": "[gMASK]<sop><|user|>\n{}<|assistant|>\n",
    "cohere": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_transformers(name: str, words: str):
    assert question_of(TEMPLATES[name].replace("<IMG_CONTEXT>", "").format(words)) == words


@pytest.mark.parametrize(
    "words", [*WORDS, "read <|im_start|>user and <|im_end|>", "is </s>USER: there", "<<SYS>> <</SYS>>?"]
)
def test_templates_of_the_authors_package(words: str):
    conversation = pytest.importorskip("llava.conversation")
    for name, template in conversation.conv_templates.items():
        one, two = template.copy(), template.copy()
        for turns, said in ((one, [words]), (two, ["first?", "an answer", words])):
            for number, text in enumerate(said):
                turns.append_message(turns.roles[number % 2], f"<image>\n{text}" if number == 0 else text)
        prompts = [one]
        if "plain" not in name:  # which has no turns
            prompts.append(two)
            for turns in prompts:
                turns.append_message(turns.roles[1], None)
        if name in ("plain", "v0_plain") and words.startswith("User: "):
            continue  # who types a whole conversation there, template and all, asks what it asks
        for turns in prompts:
            assert question_of(turns.get_prompt()) == words, name


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n",
        "<bos><start_of_turn>user\nA?<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n<start_of_turn>user\nC?<end_of_turn>\n"
        "<start_of_turn>model\n",
        "<s>[INST] A? [/INST] B</s>[INST] C? [/INST]",
        "USER: A? ASSISTANT: B USER: C? ASSISTANT:",
        "<s>" + VICUNA + "USER: A? ASSISTANT: B</s>USER: C? ASSISTANT:",
        "<|im_start|>User:A?<end_of_utterance>\nAssistant: B<end_of_utterance>\nUser:C?<end_of_utterance>\nAssistant:",
        "<s>" + VICUNA + "USER: A? ASSISTANT: B</s>USER: C? ASSISTANT: D</s>",  # with its answer, as in training
        "USER: C? ASSISTANT: an answer",
        "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    ],
)
def test_the_last_question_of_a_conversation(prompt: str):
    assert question_of(prompt) == "C?"


class Tokenizer:
    """Ids are places in a list of pieces; some pieces are special tokens."""

    pieces = ("<s>", "[INST]", "[/INST]", "[IMG]", "[IMG_END]", " is it", " red?", "<|vision_start|>")
    added_tokens_decoder = {n: SimpleNamespace(content=p, special=True) for n, p in enumerate(pieces) if p[0] in "[<"}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = False) -> str:
        shown = [i for i in ids.tolist() if not (skip_special_tokens and i in self.added_tokens_decoder)]
        return "".join(self.pieces[i] for i in shown)


def test_special_tokens_show_whose_turn_it_is():
    """They are what words cannot pretend to be; those of the picture are left out."""
    text = framed(Tokenizer(), torch.tensor([0, 1, 3, 3, 4, 7, 5, 6, 2]))
    assert text == "[INST] is it red?[/INST]"
    assert question_of(text) == "is it red?"
    assert framed(Tokenizer(), [5, 6]) == " is it red?"
