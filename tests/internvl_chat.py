"""A model with the interface of InternVL's own code, made of the weights of transformers' InternVL.

Its modules have the names, and its methods the arguments, of the `InternVLChatModel` that comes with the checkpoints.
The numbers are those of the model that it is made from, which is therefore its reference.
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import torch
from families import IMAGE
from torch import Tensor, nn

BEGIN, END = 188, 189  # around the placeholders of a picture


class Words:
    """A tokenizer whose ids are sums over letters."""

    def convert_tokens_to_ids(self, token: str) -> int:
        return IMAGE

    def encode(self, word: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % 180]

    def decode(self, ids: Tensor, **kwargs: Any) -> str:
        return " ".join(map(str, ids.tolist()))


class Embeddings(nn.Module):
    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.class_embedding, self.position_embedding = source.cls_token, source.position_embeddings
        self.patch_embedding = source.patch_embeddings.projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], 1) + self.position_embedding


class Attention(nn.Module):
    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        width, parts = source.embed_dim, (source.q_proj, source.k_proj, source.v_proj)
        self.num_heads, self.head_dim, self.scale = source.num_heads, source.head_dim, source.scale
        self.qkv = nn.Linear(width, 3 * width, bias=source.q_proj.bias is not None)
        self.qkv.weight.data = torch.cat([part.weight for part in parts])
        if self.qkv.bias is not None:
            self.qkv.bias.data = torch.cat([part.bias for part in parts])
        self.qk_normalization = not isinstance(source.q_norm, nn.Identity)
        if self.qk_normalization:
            self.q_norm, self.k_norm = source.q_norm, source.k_norm
        self.proj = source.projection_layer

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        if self.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        seen = nn.functional.scaled_dot_product_attention(*heads, scale=self.scale)
        return self.proj(seen.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(source.attention), source.mlp
        self.norm1, self.norm2 = source.layernorm_before, source.layernorm_after
        self.ls1, self.ls2 = source.lambda_1, source.lambda_2

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states)) * self.ls1
        return hidden_states + self.mlp(self.norm2(hidden_states)) * self.ls2


class Encoder(nn.Module):
    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, source.layer))

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class VisionModel(nn.Module):
    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(source.embeddings), Encoder(source.encoder)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        hidden = self.encoder(self.embeddings(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0])


class InternVLChatModel(nn.Module):
    """The class that `AutoModel` finds in the checkpoint's folder."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        core, config = source.model, source.config
        self.vision_model, text = VisionModel(core.vision_tower), config.text_config
        projector = core.multi_modal_projector
        self.mlp1 = nn.Sequential(projector.layer_norm, projector.linear_1, nn.GELU(), projector.linear_2)
        self.language_model = AutoModelForCausalLM.from_config(text, attn_implementation=text._attn_implementation)
        self.language_model.model, self.language_model.lm_head = core.language_model, source.lm_head
        self.language_model.generation_config = source.generation_config
        sides = config.vision_config.image_size[0], config.vision_config.patch_size[0]
        vision = SimpleNamespace(image_size=sides[0], patch_size=sides[1])
        self.config = SimpleNamespace(
            **{"vision_config": vision, "llm_config": text, "force_image_size": None, "select_layer": -1},
            **{"ps_version": "v2", "downsample_ratio": config.downsample_ratio, "_attn_implementation": "eager"},
        )
        self.generation_config = None
        self.img_context_token_id: int | None = None
        self.num_image_token = int((sides[0] // sides[1]) ** 2 * config.downsample_ratio**2)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.mlp1[1].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mlp1[1].weight.dtype

    def pixel_shuffle(self, x: Tensor, scale_factor: float = 0.5) -> Tensor:
        n, w, h, c = x.shape
        x = x.reshape(n, w, int(h * scale_factor), int(c / scale_factor)).permute(0, 2, 1, 3)
        x = x.reshape(n, int(h * scale_factor), int(w * scale_factor), int(c / scale_factor**2))
        return x.permute(0, 2, 1, 3).contiguous()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        hidden = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]
        side = int(hidden.shape[1] ** 0.5)
        squares = self.pixel_shuffle(hidden.unflatten(1, (side, side)), scale_factor=self.config.downsample_ratio)
        return self.mlp1(squares.flatten(1, 2))

    def forward(self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return self.language_model(input_ids=input_ids, **kwargs)

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: Any = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
    ) -> Any:
        if pixel_values is not None and "<image>" not in question:
            question = f"<image>\n{question}"
        tiles = iter(num_patches_list or ([] if pixel_values is None else [len(pixel_values)]))
        self.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        tokens, ids = [self.img_context_token_id] * self.num_image_token, []
        for word in question.replace("<image>", " <image> ").split():
            ids += [BEGIN, *tokens * next(tiles), END] if word == "<image>" else tokenizer.encode(word)
        row = torch.tensor([ids])
        said = self.generate(pixel_values, row, attention_mask=torch.ones_like(row), **generation_config)
        answer = tokenizer.decode(said[0])
        return (answer, [(question, answer)]) if return_history else answer

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        assert self.img_context_token_id is not None
        embedded = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.extract_feature(pixel_values) if visual_features is None else visual_features
            embedded[input_ids == self.img_context_token_id] = features.flatten(0, -2).to(embedded)
        return self.language_model.generate(
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )
