"""The embedded models on disk: weights in the package, laid out in a cache folder the way each host wants them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Literal

from vtp_plugin.errors import PruningError

Layout = Literal["llava", "hf", "clip"]
NAME, VIDEO_NAME = "vtp-tiny", "vtp-tiny-video"
NAMES = (NAME, VIDEO_NAME)
WEIGHTS = Path(__file__).parent / "weights"
CLIP_FACTORS = "clips.safetensors"
FILES = ("model.safetensors", "tokenizer.model", "clip/vocab.json", "clip/merges.txt")
DIGEST = "digest.json"  # beside the files: name -> hash, so that a damaged cache is noticed


def resolve(name: str = NAME, layout: Layout = "llava") -> Path:
    """The folder of an embedded model in a layout, written on first use.

    `llava`: the authors' format. `hf`: transformers' LlavaForConditionalGeneration and LlavaProcessor, of
    `vtp-tiny-video` LlavaNextVideoForConditionalGeneration and its processor. `clip`: the CLIP with both towers, both
    projections, image processor and tokenizer. The folder appears whole or not at all, and is made again if a file of
    it is damaged (DIGEST). ValueError for an unknown name or layout, PruningError if the cache cannot be written.
    """
    if name not in NAMES:
        raise ValueError(f"unknown embedded model {name!r}. Available: {', '.join(NAMES)}")
    offered = [known for model, known in WRITERS if model == name]
    if layout not in offered:
        raise ValueError(f"unknown layout {layout!r} of {name}. Available: {', '.join(offered)}")
    if name == VIDEO_NAME and not (WEIGHTS / CLIP_FACTORS).exists():
        raise PruningError(f"{name} is not trained yet: python -m vtp_plugin.tiny.clip_train --out DIR trains it")
    if name == NAME and layout != "clip":
        resolve(name, "clip")  # both others name it as their tower
    try:
        place, write = WRITERS[name, layout]
        folder = cache_folder() / place
        if not whole(folder):
            appear(folder, write)
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or error
        raise PruningError(
            f"the embedded model cannot be written into the cache folder '{_root()}' ({said}); "
            "VTP_CACHE names another one"
        ) from None
    return folder


def cache_folder() -> Path:
    """One folder per weights, layout code and place, because the authors' format stores an absolute path."""
    root = _root().expanduser().resolve()
    return root / hashlib.sha256(f"{root}{fingerprint()}".encode()).hexdigest()[:12]


def _root() -> Path:
    if chosen := os.environ.get("VTP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vtp_plugin"


def whole(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        return json.loads((folder / DIGEST).read_text()) == digests(folder)
    except (OSError, ValueError):
        return False


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file that was written; what a host put beside them later does not count."""
    written = folder / DIGEST
    names = json.loads(written.read_text()) if written.exists() else sorted(path.name for path in folder.iterdir())
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """A hash of everything that a written folder depends on."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    others = (WEIGHTS / CLIP_FACTORS, Path(__file__).with_name("clip_checkpoint.py"))
    for file in (*(WEIGHTS / name for name in FILES), *filter(Path.exists, others)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def appear(folder: Path, write: Callable[[Path], None]) -> None:
    """Write aside, then rename; of several processes the first one wins and the others agree."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(aside)
        write_json(aside / DIGEST, digests(aside))
        aside.chmod(0o755)
        if folder.exists() and not whole(folder):
            folder.rename(aside.with_name(f"{aside.name}.damaged"))
        aside.rename(folder)
    except OSError:
        if not whole(folder):
            raise
    finally:
        for left in (aside, aside.with_name(f"{aside.name}.damaged")):
            shutil.rmtree(left, ignore_errors=True)


def load_weights(*parts: str, prefixed: bool = False) -> dict:
    """Tensors of some of the parts `clip`, `projector`, `llama`; of a single one by their names within the part."""
    from safetensors import safe_open

    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.split(".")[0] in parts]  # noqa: SIM118
        return {
            name.split(".", 1)[1] if len(parts) == 1 and not prefixed else name: file.get_tensor(name) for name in names
        }


# -- the three layouts -------------------------------------------------------------------------------------------------


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
        mm_vision_tower=str(resolve(NAME, "clip")),
    )
    weights = {f"model.language_model.{name[6:]}": value for name, value in text.items() if name.startswith("model.")}
    weights |= {f"model.multi_modal_projector.{name}": value for name, value in load_weights("projector").items()}
    vision = {name: value for name, value in load_weights("clip").items() if name.startswith("vision_model.")}
    weights |= {f"model.vision_tower.{name[13:]}": value for name, value in vision.items()}
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_model(model, weights | {"lm_head.weight": text["lm_head.weight"]}, folder)
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
    config = llama_config(pieces, depth(weights)).to_dict() | llava_facts(str(resolve(NAME, "clip")))
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


def write_video(folder: Path) -> None:
    import_module("vtp_plugin.tiny.clip_checkpoint").write_video(folder)


WRITERS: dict[tuple[str, str], tuple[str, Callable[[Path], None]]] = {  # model and layout: folder, and what fills it
    (NAME, "llava"): ("llava-vtp-tiny", write_llava),
    (NAME, "hf"): ("llava-vtp-tiny-hf", write_hf),
    (NAME, "clip"): ("clip-vtp-tiny", write_clip),
    (VIDEO_NAME, "hf"): ("llava-next-vtp-tiny-video-hf", write_video),
}


def export(clip, projector, llama, source: Path, target: Path = WEIGHTS) -> None:
    """Store trained networks in the package, once, in half precision."""
    from safetensors.torch import save_file

    parts = {"clip": clip, "projector": projector, "llama": llama}
    state = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    (target / "clip").mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in state.items()}, target / FILES[0])
    for file in FILES[1:]:
        shutil.copy(source / file, target / file)
