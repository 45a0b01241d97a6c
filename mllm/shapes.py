"""Public models by name: their configurations without their weights. Imports nothing."""

from __future__ import annotations

from typing import Any


def _text(kind: str, width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more):
    return dict(
        model_type=kind, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, **more,
    )  # fmt: skip


_CLIP = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
)  # fmt: skip
_SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
    num_attention_heads=16, patch_size=14, vision_use_head=False,
)  # fmt: skip
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_TILES = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
_VICUNA = {
    "7b": _text("llama", 4096, 11008, 32, 32, 32, 32064, max_position_embeddings=4096),
    "13b": _text("llama", 5120, 13824, 40, 40, 40, 32064, max_position_embeddings=4096),
}


def _llava(size: str) -> dict[str, Any]:
    return dict(
        model_type="llava", vision_config=_CLIP, text_config=_VICUNA[size], vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_token_id=32000,
    )  # fmt: skip


def _next(size: str) -> dict[str, Any]:
    return _llava(size) | dict(model_type="llava_next", image_grid_pinpoints=_PINPOINTS)


def _mrope(*section: int) -> dict[str, Any]:
    return dict(
        rope_parameters=dict(rope_type="default", mrope_section=list(section), rope_theta=1e6)
    )


def _qwen2(width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, tied: bool = False):
    return dict(
        model_type="qwen2_vl", tie_word_embeddings=tied,
        vision_config=dict(depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, hidden_size=width),
        text_config=_text("qwen2_vl_text", width, mlp, layers, heads, kv, vocab,
                          tie_word_embeddings=tied, **_mrope(16, 24, 24)),
    )  # fmt: skip


def _qwen25(
    width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, tower: int,
    tied: bool = False,
):  # fmt: skip
    return dict(
        model_type="qwen2_5_vl", tie_word_embeddings=tied,
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=tower, num_heads=16,
                           out_hidden_size=width),
        text_config=_text("qwen2_5_vl_text", width, mlp, layers, heads, kv, vocab,
                          tie_word_embeddings=tied, **_mrope(16, 24, 24)),
    )  # fmt: skip


def _qwen3(width: int, mlp: int, layers: int, vision: dict[str, Any], tied: bool):
    return dict(
        model_type="qwen3_vl", tie_word_embeddings=tied,
        vision_config=dict(vision, num_heads=16, out_hidden_size=width),
        text_config=_text("qwen3_vl_text", width, mlp, layers, 32, 8, 151936, head_dim=128,
                          tie_word_embeddings=tied, **_mrope(24, 20, 20)),
    )  # fmt: skip


def _gemma(width: int, mlp: int, layers: int, heads: int, kv: int, head_dim: int):
    return dict(
        model_type="gemma3",
        vision_config=dict(_SIGLIP, num_hidden_layers=27, image_size=896),
        text_config=_text("gemma3_text", width, mlp, layers, heads, kv, 262208, head_dim=head_dim,
                          sliding_window=1024),
    )  # fmt: skip


#: By name, what `AutoConfig.for_model` takes.
SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava("7b"),
    "llava-1.5-13b": _llava("13b"),
    "llava-next-7b": _next("7b"),
    "llava-next-13b": _next("13b"),
    "llava-onevision-7b": dict(
        model_type="llava_onevision", image_grid_pinpoints=_TILES,
        vision_aspect_ratio="anyres_max_9",
        vision_config=dict(_SIGLIP, num_hidden_layers=26, image_size=384),
        text_config=_text("qwen2", 3584, 18944, 28, 28, 4, 152128),
    ),
    "qwen2-vl-2b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2-vl-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2-vl-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen2.5-vl-3b": _qwen25(2048, 11008, 36, 16, 2, 151936, 3420, tied=True),
    "qwen2.5-vl-7b": _qwen25(3584, 18944, 28, 28, 4, 152064, 3420),
    "qwen2.5-vl-32b": _qwen25(5120, 27648, 64, 40, 8, 152064, 3456),
    "qwen2.5-vl-72b": _qwen25(8192, 29568, 80, 64, 8, 152064, 3456),
    "qwen3-vl-4b": _qwen3(
        2560, 9728, 36,
        dict(depth=24, hidden_size=1024, intermediate_size=4096,
             deepstack_visual_indexes=[5, 11, 17]),
        tied=True,
    ),
    "qwen3-vl-8b": _qwen3(
        4096, 12288, 36,
        dict(depth=27, hidden_size=1152, intermediate_size=4304,
             deepstack_visual_indexes=[8, 16, 24]),
        tied=False,
    ),
    "internvl3-8b": dict(
        model_type="internvl", tie_word_embeddings=False,
        text_config=_text("qwen2", 3584, 18944, 28, 28, 4, 151674),
        vision_config=dict(model_type="internvl_vision"),
    ),
    "smolvlm2-2.2b": dict(
        model_type="smolvlm", scale_factor=3, image_token_id=49190,
        vision_config=dict(model_type="smolvlm_vision", hidden_size=1152, intermediate_size=4304,
                           num_hidden_layers=27, num_attention_heads=16, image_size=384,
                           patch_size=14),
        text_config=_text("llama", 2048, 8192, 24, 32, 32, 49280),
    ),
    "gemma-3-4b": _gemma(2560, 10240, 34, 8, 4, 256),
    "gemma-3-12b": _gemma(3840, 15360, 48, 16, 8, 256),
    "gemma-3-27b": _gemma(5376, 21504, 62, 32, 16, 128),
}  # fmt: skip
