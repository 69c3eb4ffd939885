"""Where this package touches the authors' `llava` package, from a model of it."""

from __future__ import annotations

from functools import partial

from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import LLAVA

_At = partial(TouchPoint, LLAVA)
MERGE = ("input_ids", "position_ids", "attention_mask", "past_key_values", "labels", "images", "image_sizes")

MODEL = (
    _At(".prepare_inputs_labels_for_multimodal", "the merge of text and features", takes=MERGE),
    _At(".encode_images", "features of the images", takes=("images",)),
    _At(".generate", "calls of the model", takes=("inputs", "images", "image_sizes")),
    _At(".", "calls of the model", takes=("input_ids", "labels", "images", "past_key_values|cache")),
    _At(".get_model()", "the parts of the model", has=("mm_projector", "layers", "rotary_emb", "norm")),
    _At(".get_vision_tower()", "the vision tower", has=("vision_tower", "select_layer", "hidden_size", "config")),
    _At(".config", "the CLIP that the tower comes from", has=("mm_vision_tower", "hidden_size")),
)
PICTURES = (_At("llava.mm_utils:process_images", "pictures as the model prepares them", takes=("images", "model_cfg")),)
ANYRES = (
    *MODEL,
    _At("llava.mm_utils:get_anyres_image_grid_shape", "how tiles lie", takes=("image_size", "grid_pinpoints")),
)
