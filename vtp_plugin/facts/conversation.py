"""The user's words in a prompt, without the conversation format that a host wrote them in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One way to write a conversation: what stands around the words of a user."""

    opener: str  # from the beginning of the prompt to the first words of the user
    answer: str  # between the words of the user and the answer
    again: str  # between the answer and the next words of the user

    def words(self, prompt: str, *, asks: bool) -> tuple[int, str] | None:
        """Where the first words begin, and the last words; None if the prompt is not written like this.

        `asks`: the prompt ends where the answer begins. Then the words end there, whatever they contain. Else an answer
        follows somewhere, and in front of the user's role is nothing but marks or a known kind of system prompt.
        """
        opened = re.match(self.opener, prompt, re.DOTALL)
        if opened is None:
            return None
        body = prompt[opened.end() :]
        end = re.search(rf"{self.answer}\s*\Z" if asks else self.answer, body)
        if end is None or not (asks or ANSWERED.fullmatch(prompt)):
            return None
        if asks:
            body = body[: end.start()]
        last = re.split(rf"{self.answer}.*?{self.again}", body, flags=re.DOTALL)[-1]
        return opened.end(), last if asks else re.split(self.answer, last)[0]


FORMATS = (
    # vicuna, with a system prompt and an end mark behind every answer; LLaVA-1.5 in transformers, without both
    Format(r"(?!\s*USER:).*?\bUSER:", r"\s*ASSISTANT:", r"</s>\s*USER:"),
    Format(r"\s*USER:", r"\s*ASSISTANT:", r"\sUSER:"),
    # ChatML: Qwen, InternVL, LLaVA-OneVision, MPT
    Format(
        r".*?<\|im_start\|>user\n?",
        r"<\|im_end\|>\s*<\|im_start\|>assistant\b",
        r"<\|im_end\|>\s*<\|im_start\|>user\n?",
    ),
    # Idefics3, SmolVLM
    Format(
        r"(?:.*?(?:<\|\w+\|>|<end_of_utterance>\n?|\n))??\s*User:",
        r"(?:<end_of_utterance>|\s)\s*Assistant:",
        r"(?:<end_of_utterance>|\s)\s*User:",
    ),
    # Gemma
    Format(
        r".*?<start_of_turn>user\n?",
        r"<end_of_turn>\s*<start_of_turn>model\b",
        r"<end_of_turn>\s*<start_of_turn>user\n?",
    ),
    # LLaMA 3
    Format(
        r".*?<\|start_header_id\|>user<\|end_header_id\|>",
        r"<\|eot_id\|>\s*<\|start_header_id\|>assistant<\|end_header_id\|>",
        r"<\|eot_id\|>\s*<\|start_header_id\|>user<\|end_header_id\|>",
    ),
    # LLaMA 2, whose first words have the system prompt in front, and Mistral
    Format(r"(?:(?!\[INST\]).)*\[INST\](?:\s*<<SYS>>\n.*?\n<</SYS>>)?", r"\[/INST\]", r"\[INST\]"),
    # the first LLaVA, sometimes with one example of a conversation in front
    Format(r".*?###\s?Human:", r"\s*###\s?Assistant:", r"###\s?Human:"),
    # Phi, GLM; Cohere
    Format(r".*?<\|user\|>", r"(?:<\|end\|>)?\s*<\|assistant\|>", r"<\|user\|>"),
    Format(r".*?<\|USER_TOKEN\|>", r"(?:<\|\w+\|>)*<\|CHATBOT_TOKEN\|>", r"<\|USER_TOKEN\|>"),
    # ChatML, Gemma and LLaMA 3 without their special tokens
    Format(r"\s*(?:system\b.*?)?user\n", r"(?:\n?assistant|\nmodel)\b", r"\nuser\n"),
)
PLACEHOLDER = re.compile(r"<(image|video)(_pad|_soft_token)?>")
MARKS = re.compile(  # special tokens that show whose turn it is, or where an answer ends
    r"</s>|<\|(im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|end|USER_TOKEN|CHATBOT_TOKEN)\|>"
    r"|<(start_of_turn|end_of_turn|end_of_utterance)>|\[/?INST\]"
)
ANSWERED = re.compile(  # a conversation that ends with an answer; a new line at its end closes the plain format
    rf"\s*(?:[<\[#]|A chat |A conversation |system\b|user\b|USER:|User:).*(?:[^\n]|(?:{MARKS.pattern})\s*)", re.DOTALL
)


def question_of(prompt: str) -> str:
    """The last words of the user; the whole prompt where no conversation format is recognised.

    The format is the one that both begins and ends the prompt; of several the one that begins first. Words that look
    like a mark or a role are words, unless they are a whole answer with marks and roles on both sides.
    """
    prompt = PLACEHOLDER.sub("", prompt)
    for asks in (True, False):
        found = [words for form in FORMATS if (words := form.words(prompt, asks=asks))]
        if found:
            return min(found, key=lambda words: words[0])[1].strip()
    return re.sub(r"\A(?:<s>|<bos>|<\|begin_of_text\|>)", "", prompt).strip()


def framed(tokenizer: Any, ids: Tensor) -> str:
    """The text of prompt ids [L] with the special tokens that show whose turn it is, without all others."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    drop = [number for number, token in added.items() if token.special and not MARKS.fullmatch(token.content)]
    ids = torch.as_tensor(ids)
    return tokenizer.decode(ids[~torch.isin(ids, ids.new_tensor(drop))], skip_special_tokens=False)
