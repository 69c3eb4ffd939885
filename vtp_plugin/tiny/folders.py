"""What fills a folder of `vtp-tiny`: the layouts that hosts read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .store import WEIGHTS, load_weights

TOWER = "clip-vtp-tiny"


def write_clip(folder: Path) -> None:
    from transformers import CLIPModel

    from .modeling import clip_config
    from .tokenizers import load_clip_tokenizer

    weights = load_weights("clip")
    model = CLIPModel(clip_config(len(weights["text_model.embeddings.token_embedding.weight"])))
    save_model(model, weights, folder)
    image_processor().save_pretrained(folder)
    load_clip_tokenizer(WEIGHTS / "clip").save_pretrained(folder)


def write_hf(folder: Path) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from .modeling import SELECT_LAYER, clip_config, depth, llama_config
    from .prompts import CHAT_TEMPLATE, IMAGE, load_llama_tokenizer
    from .scenes import GRID, PATCH

    tokenizer, text = load_llama_tokenizer(WEIGHTS), load_weights("llama")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**clip_config(8).vision_config.to_dict()),
        text_config=llama_config(len(tokenizer), depth(text)),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=SELECT_LAYER,
        image_seq_length=GRID**2,
        pad_token_id=tokenizer.pad_token_id,
        mm_vision_tower=str(tower_of(folder)),
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_model(model, composed(text, load_weights("projector")), folder)
    use_published_names(folder / "model.safetensors")
    LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def tower_of(folder: Path) -> Path:
    """The CLIP folder, which the authors' format and transformers' name as their tower, lies beside."""
    return folder.parent / TOWER


def composed(text: dict, projector: dict) -> dict:
    """Weights of a LLaVA in transformers: a language model's, a projector's, and those of the embedded tower."""
    weights = {f"model.language_model.{name[6:]}": value for name, value in text.items() if name.startswith("model.")}
    weights |= {f"model.multi_modal_projector.{name}": value for name, value in projector.items()}
    vision = {name: value for name, value in load_weights("clip").items() if name.startswith("vision_model.")}
    weights |= {f"model.vision_tower.{name[13:]}": value for name, value in vision.items()}
    return weights | {"lm_head.weight": text["lm_head.weight"]}


def write_llava(folder: Path) -> None:
    """The authors' class is not needed to write its format; the vision tower is the CLIP folder."""
    from safetensors.torch import save_file

    from .modeling import depth, llama_config

    weights, pieces = load_weights("llama"), piece_count()
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[table] = weights[table][:pieces].clone()  # without transformers' two extra tokens
    projector = load_weights("projector")
    for index, layer in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            weights[f"model.mm_projector.{index}.{kind}"] = projector[f"{layer}.{kind}"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = llama_config(pieces, depth(weights)).to_dict() | llava_facts(str(tower_of(folder)))
    write_json(folder / "config.json", config)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "generation_config.json", tokens)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    shutil.copy(WEIGHTS / "tokenizer.model", folder)


TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "legacy": False,
    "model_max_length": 2048,
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
}


def llava_facts(tower: str) -> dict[str, object]:
    """What LLaVA-1.5's config says beyond LLaMA's."""
    from .modeling import SELECT_LAYER, VISION_WIDTH

    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "dtype": "float16",
        "pad_token_id": 0,
        "image_aspect_ratio": "pad",
        "mm_vision_tower": tower,
        "mm_hidden_size": VISION_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": SELECT_LAYER,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
    }


def piece_count() -> int:
    from .prompts import load_llama_tokenizer

    return len(load_llama_tokenizer(WEIGHTS)) - 2


def image_processor():
    """Resize and crop to 168, rescale, normalise with CLIP's mean and deviation."""
    from transformers import CLIPImageProcessor

    from .modeling import MEAN, STD
    from .scenes import SIZE

    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size, image_mean=list(MEAN), image_std=list(STD))


def save_model(model, weights: dict, folder: Path) -> None:
    """Half precision on disk; the config asks for single precision, which a CPU computes faster."""
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    model.should_save_on_this_rank = lambda is_main_process: True  # every process of a distributed run may be first
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    for tower in ("text_config", "vision_config"):
        config[tower] |= {"dtype": "float32"}
    write_json(folder / "config.json", config)


def use_published_names(file: Path) -> None:
    """The tower's weights as in every published LLaVA; vLLM knows no other name, transformers >= 5.6 writes another."""
    from safetensors.torch import load_file, save_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {name.replace(new, old).replace(old, new): value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
