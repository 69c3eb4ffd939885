"""The token layouts that the hosts produce, so that training sees exactly what inference will ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import LlamaTokenizer

from .tokenizers import SYSTEM

IMAGE, PAD = "<image>", "<pad>"
BOS, EOS = 1, 2
Ids = list[int]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}{% else %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {  # layout: (text, tokenized in chunks around the image)
    "llava": (f"{SYSTEM} USER: {IMAGE}\n{{question}} ASSISTANT:", True),  # the authors' vicuna_v1
    "hf": (f"USER: {IMAGE}\n{{question}} ASSISTANT:", False),  # transformers' processor with CHAT_TEMPLATE
    "hf-system": (f"{SYSTEM} USER: {IMAGE}\n{{question}} ASSISTANT:", False),  # lmms-eval's template for llava_hf
    "llava-plain": (f"USER: {IMAGE}\n{{question}} ASSISTANT:", True),
}


def load_llama_tokenizer(path: Path) -> LlamaTokenizer:
    """The tokenizer of transformers' layout: the authors' one and two more tokens, for the image and for padding."""
    tokenizer = LlamaTokenizer.from_pretrained(path, legacy=False, add_bos_token=True, padding_side="left")
    tokenizer.add_tokens([IMAGE, PAD], special_tokens=True)
    tokenizer.pad_token = PAD
    return tokenizer


@dataclass(eq=False)
class Layout:
    """What stands before the image, and how a question becomes what stands behind it."""

    tokenizer: LlamaTokenizer
    text: str
    chunked: bool
    image: str = IMAGE
    known: dict[str, tuple[Ids, Ids]] = field(default_factory=dict)

    @property
    def prefix(self) -> Ids:
        return self.split("")[0]

    def split(self, question: str) -> tuple[Ids, Ids]:
        """Ids before and behind the image."""
        if question not in self.known:
            self.known[question] = self.tokenize(self.text.format(question=question))
        return self.known[question]

    def tokenize(self, text: str) -> tuple[Ids, Ids]:
        if self.chunked:
            before, behind = (self.tokenizer(chunk).input_ids for chunk in text.split(self.image))
            return before, behind[1:]  # without the second chunk's BOS
        ids = self.tokenizer(text).input_ids
        at = ids.index(self.tokenizer.convert_tokens_to_ids(self.image))
        return ids[:at], ids[at + 1 :]


def layouts(tokenizer: LlamaTokenizer) -> dict[str, Layout]:
    return {name: Layout(tokenizer, text, chunked) for name, (text, chunked) in TEMPLATES.items()}
