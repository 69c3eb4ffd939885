"""The question in a prompt, without the chat template around it."""

from __future__ import annotations

import re

TURNS = (  # the user's words in the conversation formats of the supported families, special tokens already gone
    re.compile(r"USER:(.*?)(?:ASSISTANT:|$)", re.DOTALL),
    re.compile(r"(?:^|\n)user\n(.*?)(?:\n(?:assistant|model)\b|$)", re.DOTALL),
    re.compile(r"\[INST\](.*?)(?:\[/INST\]|$)", re.DOTALL),
    re.compile(r"User:(.*?)(?:Assistant:|$)", re.DOTALL),
)
PLACEHOLDER = re.compile(r"<(image|video)(_pad|_soft_token)?>")


def question_of(prompt: str) -> str:
    """The last user turn; the whole prompt where no conversation format is recognised."""
    prompt = PLACEHOLDER.sub("", prompt)
    turns = next((found for turn in TURNS if (found := turn.findall(prompt))), [prompt])
    return turns[-1].strip()
