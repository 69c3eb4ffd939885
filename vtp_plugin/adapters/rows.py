"""What families in transformers share whose `get_image_features` answers with rows per image. No family itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Adapter, Tower
from vtp_plugin.adapters import v5_17
from vtp_plugin.adapters.clip import clip_tower
from vtp_plugin.facts.costs import matrices
from vtp_plugin.surgery.batching import stacked
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.prompt import PlaceholderCalls
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.tiles import TILED
from vtp_plugin.surgery.undo import Undo

VALUES = {"image": "pixel_values", "video": "pixel_values_videos"}
RECORDED = ("output_hidden_states", "output_attentions")
SIZES = ("image_sizes", "image_grid_thw", "video_grid_thw")  # whole numbers of every image or video


class RowsAdapter(Adapter):
    """A family whose prompt has one placeholder per feature row; `core` has `get_image_features`."""

    layout = TILED
    tiled = True
    parts = ("multi_modal_projector", "language_model")  # where the core has its projector and its language model

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.core = model.model
        self.projector, self.language_model = (self.core.get_submodule(path) for path in self.parts)
        self.decoder_layers = self.language_model.layers
        self.image_token: int = model.config.image_token_id
        self.served: dict[str, tuple[list[Tensor], list[int]]] = {}  # during a call: rows and samples, by kind

    def install(self, pruned: Session, undo: Undo) -> None:
        self.pruned = pruned
        PlaceholderCalls(pruned, self).install(undo)

    # -- what a family fills in -----------------------------------------------------------------------------------

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """The images of a call, then its videos, each kind in the order of its placeholders."""
        raise NotImplementedError

    def split(self, output: Any, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """The rows of every image in the host's features object, [n, D] each."""
        return output.pooler_output

    def join(self, output: Any, kind: str, rows: Sequence[Tensor], left: Sequence[Rows]) -> Any:
        """The host's features object with these rows [n, D] instead."""
        output.pooler_output = self.pack(rows, kind, output.pooler_output)
        return output

    def pack(self, rows: Sequence[Tensor], kind: str, host: Any) -> Any:
        """Rows of images [n, D] in the container that the host has them in."""
        return type(host)(rows)

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of tokens [T, N, C] as the host arranges features, per image [n, C]: see `arrangement.Arranging`."""
        raise NotImplementedError

    # -- PlaceholderModel -----------------------------------------------------------------------------------------

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        return any(map(some, map(inputs.get, VALUES.values())))

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: inputs[name] for name in SIZES if isinstance(inputs.get(name), Tensor)}

    def encode(self, call: Call, inputs: Mapping[str, Any]) -> tuple[Any, list[Rows]]:
        features, left = {}, []
        for kind, name in VALUES.items():
            if not some(inputs.get(name)):
                continue
            numbers = [number for number, image in enumerate(call.images) if image.kind == kind]
            function = getattr(self.core, named := f"get_{kind}_features")
            chosen = v5_17.arguments(function, kind, inputs) | asked(self.core, named, inputs)
            owners = [number for number in numbers for _ in range(call.images[number].tiles)]
            lengths = [call.images[number].patches or call.images[number].total for number in numbers]
            facts = {"owners": owners, "lengths": lengths, "values": inputs[name], "kind": kind, "inputs": inputs}
            with call.in_tower(numbers, **facts):
                output = function(**chosen, return_dict=True)
                pairs = self.pruned.vision.rows(self.split(output, kind, inputs))
            rows = [rows for rows, _ in pairs]
            self.served[kind] = rows, [call.images[number].sample for number in numbers]
            features[kind] = self.join(output, kind, rows, [kept for _, kept in pairs])
            left += [kept for _, kept in pairs]
        return features, left

    @contextmanager
    def serving(self, features: Any) -> Iterator[None]:
        with Undo() as undo:
            for kind, output in (features or {}).items():
                serve(self.pruned, self.core, f"get_{kind}_features", output, undo)
            if features:
                v5_17.expanding(self.core, self.model, undo, features, self._expanded)
            undo.callback(self.served.clear)  # features end with their call
            yield

    def _expanded(self, input_ids: Tensor | None, outputs: Any, expand_size: int = 1, **kwargs: Any) -> Any:
        """Features for beams and returned sequences: the images of a sample, as often as the sample is repeated.

        The host cannot tell samples apart where images keep unequal numbers of rows.
        """
        for kind, (rows, samples) in self.served.items():
            order = repeated(samples, expand_size)
            host = outputs[kind].pooler_output
            outputs[kind].pooler_output = self.pack([rows[image] for image in order], kind, host)
            levels = getattr(outputs[kind], "deepstack_features", None)
            if levels is not None:
                outputs[kind].deepstack_features = [type(level)(level[image] for image in order) for level in levels]
        return outputs


def serve(session: Session, core: nn.Module, name: str, output: Any, undo: Undo) -> None:
    """Let the model answer with these features in the call that runs now; a call inside of it has its own."""
    call = session.call

    def answer(*args: Any, **kwargs: Any) -> Any:
        return v5_17.handed_over(output) if session.call is call else original(*args, **kwargs)

    original = undo.override(core, name, answer)


def some(values: Any) -> bool:
    """Whether there are pixels at all: a batch of no images is as good as none."""
    return values is not None and len(values) > 0


def asked(core: nn.Module, function: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller of `forward` wants to see of the tower, too, where the host hands that on."""
    wanted = {name: inputs[name] for name in RECORDED if inputs.get(name)}
    return wanted if wanted and _hands_on(type(core), function) else {}


@cache
def _hands_on(core: type, function: str) -> bool:
    """Whether a backbone's forward calls this function with whatever else it was given."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(core.forward))))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == function
    ]
    return any(keyword.arg is None for call in calls for keyword in call.keywords)


def together(outputs: Sequence[Any]) -> Any:
    """What the host answers of several images, from what it answered of each; shorter ones end with zeros."""
    if len(outputs) == 1:
        return outputs[0]
    rows = [rows for output in outputs for rows in output.pooler_output]
    answers = {name: stacked([output[name] for output in outputs]) for name in outputs[0] if name != "pooler_output"}
    return type(outputs[0])(**answers, pooler_output=rows)


def repeated(samples: Sequence[int], times: int) -> list[int]:
    """The numbers of the images whose samples are given, a sample's together, as often as `generate` repeats it."""
    groups = [[n for n, owner in enumerate(samples) if owner == sample] for sample in dict.fromkeys(samples)]
    return [image for group in groups for image in group * times]


def runs(ids: Tensor, token: int) -> list[int]:
    """Lengths of the runs of a placeholder in prompts [B, L], row by row."""
    mask = torch.nn.functional.pad((ids == token).long(), (1, 1))
    step = mask.diff(dim=1)
    starts, ends = (step == 1).nonzero(), (step == -1).nonzero()
    return (ends[:, 1] - starts[:, 1]).tolist()


def flat_tower(module: nn.Module, projected: int, *, block: int = 1) -> Tower:
    """The parts of a SigLIP vision model, which has no class token."""
    return replace(clip_tower(module, projected), prefix=0, block=block)


def pooled_macs(module: nn.Module, tokens: int) -> int:
    """MACs of the one query with which a SigLIP vision model asks all tokens, where it pools them."""
    head = getattr(getattr(module, "vision_model", module), "head", None)
    if head is None:
        return 0
    width = head.attention.embed_dim
    return 2 * tokens * width**2 + 2 * tokens * width + 2 * width**2 + matrices(head.mlp)
