"""The only file that touches unstable names of transformers."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mllm.errors import DataError, MllmError

#: Oldest and newest release of transformers that the tests pass on.
TESTED = ("5.17", "5.23")

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import (
        Cache,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
    from transformers.generation import GenerateDecoderOnlyOutput
    from transformers.image_processing_utils import select_best_resolution
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.video_processing_utils import BaseVideoProcessor

    _taken = inspect.signature(create_causal_mask).parameters
    if missing := {"inputs_embeds", "past_key_values", "layer_idx"} - set(_taken):
        raise ImportError(f"create_causal_mask takes no {', '.join(sorted(missing))}")
except ImportError as error:
    raise MllmError(
        f"mllm cannot run on transformers {transformers.__version__} ({error}); releases "
        f"{TESTED[0]} to {TESTED[1]} work",
        argument="transformers",
        given=transformers.__version__,
        expected=f"{TESTED[0]} to {TESTED[1]}",
    ) from error

__all__ = [
    "BaseModelOutputWithPooling",
    "CONTINUOUS",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "PREFIX_CHECKPOINT_DIR",
    "SERVED",
    "TESTED",
    "arguments",
    "as_eager",
    "asks_plainly",
    "attention_name",
    "base_attention",
    "best_resolution",
    "causal_mask",
    "config_sha256",
    "dynamic_cache",
    "drafted_sequences",
    "eager_like",
    "encodes_first",
    "generation_sha256",
    "kept_past",
    "mask_like",
    "next_inputs",
    "one_more",
    "padding",
    "part",
    "pictures",
    "prefill",
    "processor",
    "reentrant",
    "register_attention",
    "report_targets",
    "serve",
    "take_back",
    "tensor_parallel",
    "tested",
    "unset_hf_deepspeed_config",
    "uses_cache",
    "visual_tokens",
    "warn_if_untested",
]

SERVED = ("sdpa", "eager", "flash_attention_2")
#: Ways into continuous batching, methods of a model.
CONTINUOUS = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")


def tested(version: str = transformers.__version__) -> bool:
    """Whether the tests pass on this release of transformers."""
    oldest, newest, given = (
        tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (*TESTED, version)
    )
    return oldest <= given <= newest


@functools.cache
def warn_if_untested() -> None:
    """Say once in a process that transformers is older or newer than what was tested."""
    if not tested(transformers.__version__):
        warnings.warn(
            f"mllm is tested with transformers {TESTED[0]} to {TESTED[1]}; "
            f"{transformers.__version__} may give wrong results. `make test` tells, or install "
            f"'transformers=={TESTED[1]}.*'",
            stacklevel=2,
        )


#: Building blocks of models, and the module of each under `transformers.models`.
_PARTS = {
    "Blip2QFormerModel": "blip_2.modeling_blip_2",
    "ConvNextLayerNorm": "convnext.modeling_convnext",
    "ConvNextStage": "convnext.modeling_convnext",
    "ConvNextV2Stage": "convnextv2.modeling_convnextv2",
    "DeepseekVLSamVisionProj": "deepseek_vl_hybrid.modeling_deepseek_vl_hybrid",
    "LlavaMultiModalProjector": "llava.modeling_llava",
    "RegNetStage": "regnet.modeling_regnet",
}


def part(name: str) -> type[nn.Module]:
    """A building block of a model of transformers, by the name of its class."""
    return getattr(importlib.import_module(f"transformers.models.{_PARTS[name]}"), name)


def report_targets() -> list[str]:
    """What `TrainingArguments(report_to=)` can name, of what is installed."""
    from transformers.integrations import integration_utils

    return integration_utils.get_available_reporting_integrations()


def arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call by name, further keyword arguments included.

    Some families pass `input_ids` by position.
    """
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def attention_name(module: nn.Module) -> str:
    """The attention implementation that a module dispatches to."""
    return module.config._attn_implementation or "eager"


def eager_like(config: Any) -> dict[str, str]:
    """How a part is asked for eager attention where `config` has it; else it chooses its own."""
    eager = config._attn_implementation == "eager"
    return {"attn_implementation": "eager"} if eager else {}


def as_eager(config: Any) -> Any:
    """A copy of a configuration, with eager attention."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return config


def base_attention(module: nn.Module, name: str) -> Callable:
    """transformers' own attention function `name` for this module."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def register_attention(name: str, function: Callable, mask_like: str) -> None:
    """Register an attention function and give it the mask format of `mask_like`."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[mask_like])


def serve(module: nn.Module, name: str) -> Any:
    """Point one attention module at another implementation; returns the config it had.

    Models built from one config object share it, so the module gets its own shallow copy.
    """
    original = module.config
    module.config = copy.copy(original)
    module.config._attn_implementation_internal = name
    if attention_name(module) != name:  # nothing would be read, and nothing would say so
        module.config = original
        raise MllmError(
            f"transformers {transformers.__version__} chooses the attention of a module in "
            "another way than the releases that mllm knows",
            argument="transformers",
            given=transformers.__version__,
            expected=f"{TESTED[0]} to {TESTED[1]}",
        )
    return original


def best_resolution(size: list[int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """The (height, width) among `pinpoints` that a picture of `size` pixels is padded to."""
    return select_best_resolution(size, pinpoints)


def visual_tokens(processor: Any, sizes: list[tuple[int, int]]) -> list[int] | None:
    """Placeholder tokens of pictures by (height, width); None where the processor cannot tell."""
    try:
        counted = processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in sizes])
    except (AttributeError, KeyError, TypeError):  # not written, or not for this image processor
        return None
    return list(counted["num_image_tokens"])


class _NoVideos:
    """In the place of a processor's part for videos."""

    num_frames = fps = None  # SmolVLM's template asks for them first

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise DataError(
            "this model's processor reads videos by torchvision, which is not installed; pictures "
            "work without it",
            argument="videos",
            given="a video",
            expected="pip install torchvision, the build that fits torch",
        )


def processor(path: str) -> Any:
    """The processor of a model; where torchvision is missing, without its part for videos.

    Raises:
        OSError, ValueError, ImportError: as `AutoProcessor.from_pretrained` does.
    """
    try:
        return transformers.AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError):
        if importlib.util.find_spec("torchvision") is not None:
            raise
        config = transformers.AutoConfig.from_pretrained(path)
        kind = transformers.PROCESSOR_MAPPING.get(type(config), None)
        if kind is None or "video_processor" not in kind.get_attributes():
            raise
    made = _for_pictures(kind).from_pretrained(path)
    made.for_videos, _ = BaseVideoProcessor.get_video_processor_dict(path)
    return made


@functools.cache
def _for_pictures(kind: type) -> type:
    """A class of processors that is read without its part for videos."""

    class Pictures(kind):
        video_processor = _NoVideos()
        for_videos: dict[str, Any] = {}

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **options: Any) -> list[Any]:
            # Behind the image processor and the tokenizer, it stands third in all of them.
            return [*super()._get_arguments_from_pretrained(*args, **options), None]

        def to_dict(self) -> dict[str, Any]:
            # Where torchvision is, the folder that this is saved to takes videos again.
            return super().to_dict() | {"video_processor": self.for_videos}

    Pictures.__name__ = Pictures.__qualname__ = kind.__name__  # saved with the processor
    return Pictures


#: Processors that count pictures by prompt, and would take a row of them for those of one prompt.
_BY_PROMPT = ("Gemma3Processor", "SmolVLMProcessor")


def pictures(processor: Any, images: Sequence[Sequence[Any]]) -> list[Any] | None:
    """The pictures of each prompt as a processor takes those of a batch; None for none at all."""
    if not any(images):
        return None
    if type(processor).__name__ in _BY_PROMPT:
        return [list(own) for own in images]
    return [image for own in images for image in own]


def asks_plainly(processor: Any) -> bool:
    """Whether prompts are pictures and bare text: the model has no chat template by design."""
    plain = type(processor).__name__ == "PaliGemmaProcessor"
    return plain and not getattr(processor, "chat_template", None)


def uses_cache(decoder: nn.Module, asked: bool | None) -> bool:
    """Whether a forward of the decoder without a cache would make one."""
    if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
        return False
    return bool(decoder.config.use_cache if asked is None else asked)


def config_sha256(model: nn.Module) -> str:
    """Hash of a model's architecture: its config without names, versions, dtype and backend."""

    def left_out(name: str) -> bool:
        return name.startswith("_") or name in ("transformers_version", "dtype", "architectures")

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items() if not left_out(str(k))}
        return value

    return _sha256(plain(model.config.to_dict()))


def generation_sha256(model: nn.Module) -> str:
    """Hash of what a model's generation config says of its own: penalties, end tokens and so on."""
    given = model.generation_config.to_diff_dict()
    return _sha256({k: v for k, v in given.items() if k[0] != "_" and k != "transformers_version"})


def _sha256(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def encodes_first(base: nn.Module) -> bool:
    """Whether generate() computes features before the prompt is read (5.17 does it in forward)."""
    return "mm_encoder_outputs" in inspect.signature(base.forward).parameters


def dynamic_cache(decoder: nn.Module) -> DynamicCache:
    """An empty cache for the decoder."""
    return DynamicCache(config=decoder.config)


#: Whether windows of a cache can go back, and are made small again by `crop`.
_RECORDS = hasattr(Cache, "activate_past_recording")


def kept_past(cache: Cache) -> None:
    """Let a cache forget nothing from now on that :func:`take_back` may need."""
    if _RECORDS:
        cache.activate_past_recording()


def take_back(cache: Cache, count: int) -> None:
    """Take the newest `count` tokens of a cache back."""
    if count or _RECORDS:  # older releases take 0 for a length
        cache.crop(-count)


def prefill(model: nn.Module, ids: Tensor, config: Any, given: dict[str, Any]) -> Any:
    """Read a prompt as `generate()` does.

    Args:
        model: a model that generates.
        ids: int64 `[batch, rows]`.
        config: the generation config.
        given: what `generate()` has prepared beside the ids.
    """
    return model._prefill(ids, config, given)


def next_inputs(model: nn.Module, ids: Tensor, rows: int, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward over the newest `rows` of `ids`, the others being in the cache."""
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=rows, **given)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = rows
    return inputs | {"return_dict": True}


def one_more(model: nn.Module, output: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What :func:`next_inputs` is given when there is one token more behind an output."""
    return model._update_model_kwargs_for_generation(output, dict(given))


def padding(config: Any, criteria: Any) -> Tensor | None:
    """The token that `generate()` writes behind an answer that has ended; None if it writes on."""
    ends = any(hasattr(x, "eos_token_id") for x in criteria)
    return config._pad_token_tensor if ends else None


def drafted_sequences(sequences: Tensor, logits: list, scores: list, cache: Cache, config: Any):
    """What `generate()` returns under a config: `[batch, tokens]`, or an object with more."""
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        logits=tuple(logits) if config.output_logits else None,
        scores=tuple(scores) if config.output_scores else None,
        past_key_values=cache,
    )


def reentrant(layer: nn.Module) -> bool:
    """Whether a layer is about to run under reentrant gradient checkpointing."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return False
    return bool(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"))


def causal_mask(
    config: Any, hidden: Tensor, valid: Tensor | None, cache: Cache | None, layer: int
) -> Tensor | None:
    """The mask of one decoder layer over its own KV slots, in the backend's format.

    Args:
        config: the decoder's config.
        hidden: `[batch, rows, width]`, the layer's input.
        valid: bool `[batch, slots + rows]`, or None if nothing is padded (keeps the fast path).
        cache: the cache before the layer's update.
        layer: index of the layer.
    """
    if valid is not None and cache is not None:
        # transformers indexes a 2-D mask by logical position: slots lie at the end of it.
        offset = cache.get_mask_sizes(hidden.shape[1], layer)[1]
        if offset > 0:
            valid = torch.nn.functional.pad(valid, (offset, 0))
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=cache,
        layer_idx=layer,
        # One new row and some padding: transformers would ask the device whether there is any.
        # And without a mask, attention of PaliGemma's decoder would see what is behind a row.
        allow_is_causal_skip=(valid is None or hidden.shape[1] > 1)
        and not getattr(config, "use_bidirectional_attention", False),
    )


def mask_like(seen: Tensor, mask: Tensor | None) -> Tensor:
    """A bool mask `[batch, 1, rows, slots]` in the format of the model's own mask.

    Args:
        seen: what is seen.
        mask: the model's own mask, bool or additive; None is that of sdpa, bool.
    """
    if mask is None or mask.dtype == torch.bool:
        return seen
    zero = torch.zeros(seen.shape, dtype=mask.dtype, device=seen.device)
    return zero.masked_fill(~seen, torch.finfo(mask.dtype).min)


def tensor_parallel(model: nn.Module) -> int:
    """Ranks that the weights of each layer are spread over."""
    return getattr(model, "_tp_size", None) or 1


def splits_projections(module: nn.Module) -> bool:
    """Whether an attention module projects queries and values each for themselves."""
    return hasattr(module, "q_proj") and hasattr(module, "v_proj")


@contextlib.contextmanager
def projecting(
    module: nn.Module, size: int, rows: Tensor | None, values: bool
) -> Iterator[None]:
    """While open, an attention module computes no projection that nobody reads.

    Args:
        module: one of which :func:`splits_projections` is true, unless everything is read.
        size: rows of its input.
        rows: int64 `[batch, n]`, rows whose queries are read, those of others are zeros; None is
            all.
        values: whether values are read; otherwise all are those of the first row.
    """
    handles: list[Any] = []

    def few(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0].gather(1, rows[..., None].expand(-1, -1, args[0].shape[2]))

    def spread(_: nn.Module, args: Any, found: Tensor) -> Tensor:
        whole = found.new_zeros(found.shape[0], size, found.shape[2])
        return whole.scatter(1, rows[..., None].expand_as(found), found)

    def first(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0][:, :1]

    def repeat(_: nn.Module, args: Any, found: Tensor) -> Tensor:
        return found.expand(-1, size, -1)

    if rows is not None:
        handles += _around(module.q_proj, few, spread)
    if not values:
        handles += _around(module.v_proj, first, repeat)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _around(projection: nn.Module, before: Callable, after: Callable) -> list[Any]:
    """Hooks for calls of this thread alone: another may be running the same module."""
    thread = threading.get_ident()

    def own(hook: Callable) -> Callable:
        return lambda *given: hook(*given) if threading.get_ident() == thread else None

    return [
        projection.register_forward_pre_hook(own(before)),
        projection.register_forward_hook(own(after)),
    ]
