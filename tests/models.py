"""Tiny random checkpoints of every model family, and prompts for them that do not depend on the family.

A prompt is a list of token ids and of uint8 images [3, 48, 48], in the order in which the model reads them. A new
family needs a subclass of `Tiny` and a line in FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, LlamaConfig
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration as HfLlava

from vtp_plugin.hosts.llava import frozen
from vtp_plugin.hosts.transformers import shapes
from vtp_plugin.surgery.undo import Undo

SIDE, PATCH, GRID = 48, 8, 6
N = GRID * GRID
PLACEHOLDER = 90
NEW = 4  # tokens of an answer
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"patch_size": PATCH, "image_size": SIDE, "projection_dim": 24}
TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 514, "eos_token_id": 513, "bos_token_id": 512, "pad_token_id": 513, "projection_dim": 24}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 100, "pad_token_id": 0}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": None, "bos_token_id": 1}

KEPT = TemporaryDirectory(prefix="vtp-clip-")  # removed when the interpreter ends

Row = list  # of int and of Tensor [3, SIDE, SIDE] uint8


class Words:
    """A tokenizer whose id 7 is the word w7."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split() if word[1:].isdigit()]}

    def decode(self, ids: Tensor, skip_special_tokens: bool = False) -> str:
        return f"A chat. USER: {words(ids.tolist())} ASSISTANT:"


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


class Tiny:
    """One random model, its parts, and how its family is called."""

    family = ""
    tower: nn.Module
    projector: nn.Module
    decoder: nn.Module

    def __init__(self, model: nn.Module, processor: Any, clip: Path) -> None:
        self.model, self.processor, self.clip = model, processor, clip
        self.find_parts()

    def find_parts(self) -> None:
        """Set tower, projector and decoder."""
        raise NotImplementedError

    def inputs(self, rows: Sequence[Row], padded: bool = True) -> dict[str, Any]:
        """The arguments of the family's `generate`; with an attention mask if `padded`."""
        raise NotImplementedError

    def normalise(self, images: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.stack(list(images)).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.images.image_mean, self.images.image_std))
        return ((values - mean) / std).to(dtype)

    @property
    def images(self) -> CLIPImageProcessor:
        return self.processor.image_processor

    def forward(self, rows: Sequence[Row], padded: bool = True, **kwargs: Any) -> Any:
        return self.model(**self.inputs(rows, padded), **kwargs)

    def generate(self, rows: Sequence[Row], padded: bool = True, **kwargs: Any) -> Any:
        """The host's own output of `generate`, sequences without the prompt; `logits` holds one [B, V] per step."""
        kwargs = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | kwargs
        output = self.model.generate(**self.inputs(rows, padded), **{"max_new_tokens": NEW} | kwargs)
        output.sequences = output.sequences[:, -len(output.logits) :]
        return output

    def numbers(self, rows: Sequence[Row]) -> list[list[int]]:
        """Per row, the numbers that its images have in a call."""
        count = iter(range(1000))
        return [[next(count) for part in row if isinstance(part, Tensor)] for row in rows]

    def prune(self, strategies: Any, /, **hyper: Any) -> Any:
        from vtp_plugin import prune

        return prune(self.model, strategies, processor=self.processor, **hyper)


class Hf(Tiny):
    """transformers' LLaVA: one placeholder id per visual token."""

    family = "llava_hf"

    def find_parts(self) -> None:
        core = self.model.model
        self.tower, self.projector, self.decoder = core.vision_tower, core.multi_modal_projector, core.language_model

    def inputs(self, rows: Sequence[Row], padded: bool = True) -> dict[str, Any]:
        flat = [[i for p in row for i in ([PLACEHOLDER] * N if isinstance(p, Tensor) else [p])] for row in rows]
        ids, mask = left_padded(flat)
        images = [part for row in rows for part in row if isinstance(part, Tensor)]
        pixels = {"pixel_values": self.normalise(images)} if images else {}
        return {"input_ids": ids, **({"attention_mask": mask} if padded else {}), **pixels}


class Authors(Tiny):
    """The authors' package: one placeholder -200 per image; a prompt without images consumes one all the same."""

    family = "llava"

    def find_parts(self) -> None:
        core = self.model.get_model()
        self.tower, self.projector, self.decoder = core.vision_tower.vision_tower, core.mm_projector, core

    def inputs(self, rows: Sequence[Row], padded: bool = True) -> dict[str, Any]:
        ids, mask = left_padded([[-200 if isinstance(part, Tensor) else part for part in row] for row in rows])
        blank = [torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)]
        images = [image for row in rows for image in [p for p in row if isinstance(p, Tensor)] or blank]
        return {"inputs": ids, "images": self.normalise(images)} | ({"attention_mask": mask.bool()} if padded else {})

    def forward(self, rows: Sequence[Row], padded: bool = True, **kwargs: Any) -> Any:
        inputs = self.inputs(rows, padded)
        return self.model(input_ids=inputs.pop("inputs"), **inputs, **kwargs)

    def numbers(self, rows: Sequence[Row]) -> list[list[int]]:
        count, numbered = 0, []
        for row in rows:
            own = sum(isinstance(part, Tensor) for part in row)
            numbered.append(list(range(count, count + own)))
            count += max(1, own)
        return numbered


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [B, L]."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def randomise(module: nn.Module, seed: int) -> None:
    """Weights that make attention peaked and biases matter: a timid model gives everything the same answer."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        fan = p[0].numel() if p.ndim > 1 else 1
        scale = 1.0 if "embed" in name and p.ndim == 2 else 1.5 * fan**-0.5 if p.ndim > 1 else 0.2
        p.data = torch.randn(p.shape, generator=draw) * scale + (p.ndim == 1 and "norm" in name and "bias" not in name)


@cache
def clip_folder() -> Path:
    """A saved random CLIPModel with tokenizer and image processor."""
    folder = Path(KEPT.name)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))
    randomise(clip, seed=1)
    clip.save_pretrained(folder)
    _tokenizer(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


def clip_text_of(vision: Any, folder: Path) -> Path:
    """A saved random CLIPModel with a vision tower of these sizes, and its tokenizer."""
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision.to_dict(), projection_dim=16))
    randomise(clip, seed=3)
    clip.save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    """CLIP's byte-level BPE without a single merge."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)


def _processor() -> Any:
    return SimpleNamespace(image_processor=CLIPImageProcessor.from_pretrained(clip_folder()), tokenizer=Words())


def _plain(model: nn.Module) -> nn.Module:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.lm_head.weight.data[PLACEHOLDER] = 0  # the host itself fails on an answer with placeholders
    return model.eval()


def build_hf(attention: str) -> Tiny:
    config = HfConfig(vision_config={"model_type": "clip_vision_model", **VISION}, text_config=LlamaConfig(**LLAMA))
    config.image_token_id, config.image_seq_length = PLACEHOLDER, N
    model = HfLlava._from_config(config, attn_implementation=attention)
    randomise(model, seed=2)
    tower, clip = model.model.vision_tower, CLIPModel.from_pretrained(clip_folder()).vision_model
    getattr(tower, "vision_model", tower).load_state_dict(getattr(clip, "vision_model", clip).state_dict())
    return Hf(_plain(model), _processor(), clip_folder())


def build_authors(attention: str) -> Tiny:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig(**LLAMA, mm_vision_tower=str(clip_folder()), mm_hidden_size=VISION["hidden_size"])
    config.mm_projector_type, config.mm_vision_select_layer = "mlp2x_gelu", -2
    config.mm_vision_select_feature, config.mm_patch_merge_type = "patch", "flat"
    config.tokenizer_padding_side, config.pretraining_tp, config.attn = "left", 1, attention
    model = LlavaLlamaForCausalLM._from_config(config, attn_implementation=attention)
    randomise(model, seed=2)
    model.get_vision_tower().load_model()
    model.get_vision_tower().vision_tower.set_attn_implementation(attention)
    frozen.serve(model, Undo())  # unpruned, too: by itself the package runs up to transformers 5.23
    return Authors(_plain(model), _processor(), clip_folder())


FAMILIES: dict[str, Callable[[str], Tiny]] = {"llava_hf": build_hf, "llava": build_authors}


@cache
def tiny(family: str, attention: str = "sdpa") -> Tiny:
    """One model per family and attention; every test leaves it as it was."""
    return FAMILIES[family](attention)


@cache
def built(name: str) -> nn.Module:
    """A shape of the bench, once."""
    torch.manual_seed(0)
    return shapes.shape_of(name).build(None, torch.device("cpu"), torch.float32, "sdpa")


# -- prompts ----------------------------------------------------------------------------------------------------------


def picture(seed: int, flat: float = 0.5) -> Tensor:
    """Noise whose upper part is made of flat 16 x 16 blocks, which V-PRUNE reduces to a quarter."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    blocks = torch.randint(0, 256, (3, SIDE // 16, SIDE // 16), generator=draw, dtype=torch.uint8)
    rows = round(flat * SIDE / 16) * 16
    image[:, :rows] = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :rows]
    return image


def prompts(kind: str) -> list[Row]:
    """One prompt (`single`) or several.

    `batch`: two images, text only, one image, all of unequal length. `even`: equally long, no padding.
    `packed`, `packed-even`: the row that loses most is the longest, so that it has no padding to lose instead.
    """
    if kind == "single":
        return [[1, 5, 9, picture(0, 0.4), 11, 12, 40, 13]]
    if kind == "even":
        return [[1, 5, picture(1, 0.0), 8, 30], [1, 6, picture(2, 0.7), 9, 31], [1, 7, picture(3, 0.4), 10, 32]]
    if kind.startswith("packed"):
        text = range(10, 49 if kind == "packed-even" else 48)
        return [[1, picture(1, 0.3), 5, picture(2, 0.7), 6, 41], [1, picture(3, 0.0), *text]]
    first = [1, 5, picture(4, 0.7), 9, 10, picture(5, 0.3), 11, 41]
    return [first, [1, 17, 18, 19], [1, 21, picture(6, 0.0), 22, 23, 24, 25]]
