"""The embedded model before training: a small but ordinary LLaVA, its tokenizer and processor."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm.yardstick.questions import vocabulary
from mllm.yardstick.scenes import FULL, PATCH

# No role words: a question is one space and its text, an answer one space, its text and </s>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.content is string %} {{ message.content }}"
    "{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 500 tokens; capitals and digits always stand alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        vocabulary(),
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<pad>", "<s>", "</s>", "<image>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def new_processor() -> LlavaProcessor:
    """Processor of the embedded model: 336 pixels, patch 14, [CLS] dropped before the projector."""
    image_processor = LlavaImageProcessorPil(
        do_pad=True,  # as LLaVA-1.5: a picture of any shape is seen whole
        size={"shortest_edge": FULL},
        crop_size={"height": FULL, "width": FULL},
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=new_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """Randomly initialised model of 8.2 M parameters (15.6 MiB in bf16), mimetic language model."""
    torch.manual_seed(seed)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=FULL,
        patch_size=PATCH,
        projection_dim=192,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=(FULL // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    model.generation_config.max_new_tokens = 16
    mimetic_init(model)
    return model


@torch.no_grad()
def mimetic_init(model: LlavaForConditionalGeneration, copy: float = 0.4) -> None:
    """Start every decoder layer as "attend to what looks like me, and copy it".

    W_q = W_k is orthonormal and W_o = `copy` * W_v^T. With visual tokens aligned to word
    embeddings, a question word then finds its patches from the first step.

    Source: Trockman & Kolter, "Mimetic Initialization of Self-Attention Layers", 2023.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        width = attention.q_proj.in_features
        query, value = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
        attention.q_proj.weight.copy_(query)
        attention.k_proj.weight.copy_(query)
        attention.v_proj.weight.copy_(value)
        attention.o_proj.weight.copy_(copy * value.T)
