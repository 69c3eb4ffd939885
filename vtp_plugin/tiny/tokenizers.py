"""Two small tokenizers, trained on what is said about scenes: sentencepiece for the LLaMA, byte-level BPE for CLIP."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .questions import CHOICES, ask_eight, caption_part, caption_scene
from .scenes import sample_scene

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPTS = (
    SYSTEM,
    "USER: ASSISTANT:",
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Describe the image. Describe this picture in detail. What is shown in the image? Please answer yes or no.",
    "Is there a person, a dog or a cat in the image? How many people are there? What is on the left of the table?",
    "What color is the car? Where is the book? Which animal is this? Who is in the photo? Why is the man standing?",
    "A. B. C. D. Question: Context: Options: Answer: Yes No",
    "the of and to in is that it for was on are as with his they at be this have from or one had by but not what "
    "all were we when your can said there use an each which she do how their if will up other about out many then "
    "them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who its now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good "
    "sentence man think say great where help through much before line right too mean old any same tell boy follow "
    "came want show also around form three small set put end does",
)
LLAMA_PIECES = 800
CLIP_MERGES = 600


def corpus(scenes: int = 2000) -> list[str]:
    """Questions with answers and captions of training scenes, and the words of common prompts."""
    rng = np.random.default_rng(0)
    lines = []
    for seed in range(scenes):
        scene = sample_scene("train", seed)
        lines += [f"{question.text} ASSISTANT: {question.answer}" for question in ask_eight(scene, rng)]
        lines += [caption_scene(scene, rng).text, caption_part(scene, rng).text]
    return lines + list(PROMPTS) * 200


def train_llama_tokenizer(path: Path, lines: list[str]) -> None:
    """Write `tokenizer.model`; every answer of every task is one piece."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=LLAMA_PIECES,
        byte_fallback=True,
        split_by_unicode_script=False,
        split_by_number=False,
        split_digits=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for answer in (answer for choices in CHOICES.values() for answer in choices):
        if len(pieces.encode(answer)) != 1:
            raise ValueError(f"answer {answer!r} is {pieces.encode(answer, out_type=str)}, not one piece")


def train_clip_tokenizer(path: Path, lines: list[str]) -> None:
    """Write CLIP's `vocab.json` and `merges.txt`: 256 bytes, 256 bytes that end a word, merges, start, end."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    untrained = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=512 + CLIP_MERGES, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]][:CLIP_MERGES]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def load_clip_tokenizer(path: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(path, model_max_length=77)
