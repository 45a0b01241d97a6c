"""What vision towers made of transformers' encoders have in common."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from mllm import compat
from mllm.compat import BaseModelOutputWithPooling
from mllm.errors import DataError, PlanError, first_line
from mllm.models.base import shrink

#: Words of a question that towers read, the last ones.
WORDS = 128
#: What is said of an encoder beside its configuration.
SPEC = ("config", "name", "layer", "size", "mean", "std")
_DERIVED = ("encoders", "patch_size", "hidden_size")
#: What a configuration says of its file, or of the encoder as a backbone.
_NOT_OURS = (
    "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures",
    "stage_names", "out_features", "out_indices", "_out_features", "_out_indices",
)  # fmt: skip


def refuse(message: str, argument: str, given: Any, expected: str) -> NoReturn:
    """Raise a PlanError."""
    raise PlanError(message, argument=argument, given=given, expected=expected)


@dataclasses.dataclass(frozen=True)
class Question:
    """The words around the pictures of a call, as the LLM embeds them.

    Attributes:
        words: `[samples, words, width]`, the last ones of each sample, right-aligned.
        valid: bool `[samples, words]`.
        pictures: pictures of each sample.
    """

    words: Tensor
    valid: Tensor
    pictures: list[int]

    def of(self, pictures: int) -> tuple[Tensor, Tensor]:
        """Words and which of them there are, for each of the pictures that the tower is given."""
        owner = [sample for sample, n in enumerate(self.pictures) for _ in range(n)]
        if len(owner) < pictures:
            raise DataError(
                f"the prompts have placeholders for {len(owner)} pictures, and {pictures} were "
                "given",
                argument="input_ids",
                given=self.pictures,
                expected=f"{pictures} pictures",
            )
        # A later turn brings the pictures behind those that were read before.
        at = torch.tensor(owner[len(owner) - pictures :], device=self.words.device)
        return self.words[at], self.valid[at]


_QUESTION: ContextVar[Question | None] = ContextVar("mllm_tower_question", default=None)


@contextlib.contextmanager
def asking(question: Question | None) -> Iterator[None]:
    """Let towers read a question inside this context."""
    token = _QUESTION.set(question)
    try:
        yield
    finally:
        _QUESTION.reset(token)


class TowerConfig(PreTrainedConfig):
    """Configuration of a tower.

    Attributes:
        encoders: of each its `config` (a dict with `model_type`), and perhaps `name`, `layer` (a
            hidden state instead of the last), `size` (pixels) and `mean`, `std` of the pixels that
            it was trained on.
        image_size: side of the pictures, in pixels.
        patch_size: side of a visual token, in pixels.
        hidden_size: channels of a visual token.
        image_mean, image_std: normalisation of the pictures that the tower is given.
        text_width: channels of the words that it reads.
    """

    encoders: list | None = None
    image_size: int = 336
    patch_size: int | None = None
    hidden_size: int | None = None
    num_channels: int = 3
    image_mean: list | None = None
    image_std: list | None = None
    text_width: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the visual tokens of a picture."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.grid[0] * self.grid[1]

    def inner(self, number: int) -> PreTrainedConfig:
        """The configuration of an encoder."""
        return AutoConfig.for_model(**self.encoders[number]["config"])

    def channels(self, number: int) -> int:
        """Channels of what an encoder says."""
        config = self.inner(number)
        if hasattr(config, "hidden_sizes"):  # ConvNeXt
            return config.hidden_sizes[-1]
        return getattr(config, "output_channels", config.hidden_size)  # behind SAM's neck

    def side(self, number: int) -> int:
        """Rows of the map of an encoder, which is square."""
        config = self.inner(number)
        pixels = self.encoders[number].get("size") or config.image_size
        if hasattr(config, "hidden_sizes"):
            return pixels // stride(config)
        return pixels // config.patch_size

    def narrow(self) -> TowerConfig:
        """The same tower with small encoders, for a trial."""
        config = copy.deepcopy(self)
        for spec in config.encoders:
            spec["config"] = _narrow(spec["config"])
        given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return type(self)(**given | dict.fromkeys(_DERIVED[1:]) | self.smaller())

    def smaller(self) -> dict[str, Any]:
        """What is smaller in a trial, beside the encoders."""
        return {}


def stride(config: PreTrainedConfig) -> int:
    """Pixels of a cell of a ConvNeXt's last map, in each direction."""
    return config.patch_size * 2 ** (len(config.hidden_sizes) - 1)


def _narrow(config: dict[str, Any]) -> dict[str, Any]:
    small = {"hidden_size": 32, "intermediate_size": 32, "mlp_dim": 32, "num_attention_heads": 4}
    if "hidden_sizes" in config:
        small = {"hidden_sizes": [8] * len(config["hidden_sizes"])}
        small["depths"] = [1] * len(config["hidden_sizes"])
    elif "num_hidden_layers" in config:
        small["num_hidden_layers"] = 2
    if "global_attn_indexes" in config:
        small["global_attn_indexes"] = [0]
    return config | {key: value for key, value in small.items() if key in config}


class Encoder(nn.Module):
    """One encoder of transformers: pictures to a map `[pictures, channels, rows, cols]`.

    Args:
        config: of the tower.
        number: which of its encoders.
        any_size: take pictures as they are, instead of at the encoder's own size.
    """

    def __init__(self, config: TowerConfig, number: int, any_size: bool = False) -> None:
        super().__init__()
        spec, inner = config.encoders[number], config.inner(number)
        self.model = AutoModel.from_config(inner, **compat.eager_like(config))
        if hasattr(inner, "hidden_sizes"):  # without attention, any implementation will do
            self.model._supports_sdpa = self.model._supports_flash_attn = True
        self.given, self.spec = config, spec
        self.layer = spec.get("layer")
        self.size = None if any_size else spec.get("size") or inner.image_size
        self.options: dict[str, Any] = {}
        if self.layer is not None:
            self.options["output_hidden_states"] = True
        known = inspect.signature(self.model.forward).parameters
        if self.size not in (None, inner.image_size) and "interpolate_pos_encoding" in known:
            self.options["interpolate_pos_encoding"] = True

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures as the tower is given them, `[pictures, channels, height, width]`."""
        if self.size is not None and tuple(pixels.shape[-2:]) != (self.size, self.size):
            pixels = shrink(pixels, (self.size, self.size))
        if self.spec.get("mean") and self.given.image_mean:
            was, to = (
                [pixels.new_tensor(x).view(-1, 1, 1) for x in pair]
                for pair in (
                    (self.given.image_mean, self.given.image_std),
                    (self.spec["mean"], self.spec["std"]),
                )
            )
            pixels = (pixels * was[1] + was[0] - to[0]) / to[1]
        output = self.model(pixels, **self.options)
        found = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        if found.dim() == 4:  # ConvNeXt, SAM
            return found
        side = int((found.shape[1]) ** 0.5)
        cells = found[:, found.shape[1] - side**2 :]  # without [CLS] and registers
        return cells.transpose(1, 2).unflatten(2, (side, side))


def tokens_of(maps: Tensor) -> Tensor:
    """Maps `[pictures, channels, rows, cols]` as tokens `[pictures, cells, channels]`."""
    return maps.flatten(2).transpose(1, 2)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: what it adds changes nothing at first."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Tower(PreTrainedModel):
    """A vision tower for `LlavaForConditionalGeneration`, made of encoders of transformers.

    It is called like any other, and gives the same container: `last_hidden_state`, which is also
    the only entry of `hidden_states`, `[pictures, visual tokens, channels]`.

    Attributes:
        encoders: the encoders, in the order of the configuration. All other parameters are new:
            they are trained and frozen with the projector.
        reads_text: whether it reads the question.
        any_size: whether it takes pictures of any multiple of its patches.
        has_grid: whether visual tokens have places in the picture.
        count: (fewest, most) encoders.
    """

    config_class = TowerConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    reads_text = False
    any_size = False
    has_grid = True
    count = (1, 1)

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        fewest, most = self.count
        given = len(config.encoders or ())
        if not fewest <= given <= most:
            refuse(
                f"{type(self).__name__} is made of {fewest}{'' if most == fewest else ' or more'} "
                f"encoders, not of {given}",
                "encoders", given, f"{fewest} to {most}",
            )  # fmt: skip
        self.encoders = nn.ModuleList(
            Encoder(config, number, self.any_size) for number in range(given)
        )
        self._counted: dict[tuple[int, int], float] = {}

    @classmethod
    def of(cls, *encoders: Any, weights: bool = True, **fields: Any) -> Tower:
        """A tower from its encoders.

        Args:
            encoders: each a model of transformers, its configuration (then the weights are
                random), the name or folder of one, or a dict with `path` or `config` and perhaps
                `name`, `layer`, `size`, `mean`, `std` (:class:`TowerConfig`).
            weights: whether to read the weights behind names and folders.
            fields: further fields of the tower's configuration.

        Raises:
            PlanError: an unknown field, or another number of encoders than the tower has.
            DataError: an encoder that cannot be read.
        """
        known = cls.fields()
        for name in fields:
            if name not in known:
                refuse(f"{cls.__name__} has no {name!r}", name, fields[name], ", ".join(known))
        found = [_read(source, weights) for source in encoders]
        tower = cls(cls.config_class(encoders=[spec for spec, _ in found], **fields))
        for encoder, (_, model) in zip(tower.encoders, found, strict=True):
            if model is not None:
                encoder.model = model
        return tower

    @classmethod
    def fields(cls) -> list[str]:
        """What :meth:`of` and recipes can say of it beside its encoders."""
        other = {f.name for f in dataclasses.fields(PreTrainedConfig)} | set(_DERIVED)
        return [f.name for f in dataclasses.fields(cls.config_class) if f.name not in other]

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that belong to no encoder."""
        return [p for name, p in self.named_parameters() if not name.startswith("encoders.")]

    def meet(self, text_width: int) -> None:
        """Get ready for the words of an LLM of that width."""
        if not self.reads_text:
            return
        if self.config.text_width is None:
            self.config.text_width = text_width
            self.read_words(text_width)
        elif self.config.text_width != text_width:
            refuse(
                f"the tower reads words of {self.config.text_width} channels, and those of the "
                f"LLM have {text_width}",
                "text_width", self.config.text_width, str(text_width),
            )  # fmt: skip

    def read_words(self, width: int) -> None:
        """Make what reads words of that width."""

    def question(self, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Words and which there are, for each picture; None where nothing is asked."""
        asked = _QUESTION.get()
        if asked is None or self.config.text_width is None:
            return None
        words, valid = asked.of(len(pixels))
        return words.to(pixels), valid

    def projector(self, text_config: Any) -> nn.Module | None:
        """What takes the place of LLaVA's projector, if anything does."""
        return None

    def features(self, pixels: Tensor) -> Tensor:
        """Visual tokens of pictures: `[pictures, visual tokens, channels]`."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Refuse pictures of another size.

        Raises:
            DataError: says which sizes the tower takes.
        """
        side, patch = self.config.image_size, self.config.patch_size
        fits = height % patch == width % patch == 0 if self.any_size else height == width == side
        if not fits or not height:
            raise DataError(
                f"{type(self).__name__} is given pictures of {height} x {width} pixels",
                argument="pixel_values",
                given=[height, width],
                expected=f"multiples of {patch} pixels" if self.any_size else f"{side} x {side}",
            )

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pictures `[pictures, channels, height, width]`, normalised, to visual tokens.

        Raises:
            DataError: pictures of a size that the tower does not take.
        """
        self.check_size(*pixel_values.shape[-2:])
        found = self.features(pixel_values.to(self.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=found, hidden_states=(found,))

    @torch.no_grad()
    def flops(self, height: int, width: int) -> float:
        """FLOPs of one picture, without those of reading a question: torch counts them."""
        size = (height, width)
        if size not in self._counted:
            config = compat.as_eager(self.config)
            with torch.device("meta"), FlopCounterMode(display=False) as counter, asking(None):
                twin = type(self)(config).eval().requires_grad_(False)
                twin(torch.empty(1, config.num_channels, *size, dtype=twin.dtype))
            self._counted[size] = float(counter.get_total_flops())
        return self._counted[size]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)


def _read(source: Any, weights: bool) -> tuple[dict[str, Any], nn.Module | None]:
    """An encoder's entry of the configuration, and its model if it has weights."""
    spec = dict(source) if isinstance(source, Mapping) else {}
    if "model_type" in spec:  # a configuration as a dict
        spec = {"config": spec}
    source = source if not spec else spec.pop("path", spec.get("config"))
    if odd := set(spec) - set(SPEC):
        refuse(f"an encoder has no {min(odd)!r}", min(odd), spec[min(odd)], ", ".join(SPEC))
    model = None
    if isinstance(source, str | Path):
        try:
            config = AutoConfig.from_pretrained(source)
            config = getattr(config, "vision_config", config)
            if weights:
                model = AutoModel.from_pretrained(source, config=config)
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read an encoder from {source}: {first_line(error)}",
                argument="encoders",
                given=source,
                expected="a folder with a vision encoder, or a hub name",
            ) from error
    elif isinstance(source, PreTrainedModel):
        model, config = source, source.config
    elif isinstance(source, PreTrainedConfig):
        config = source
    elif isinstance(source, Mapping) and "model_type" in source:
        config = AutoConfig.for_model(**source)
    else:
        refuse(
            "an encoder is a model, a configuration, a name or a dict with one of them",
            "encoders", source, "path or config",
        )  # fmt: skip
    kept = {k: v for k, v in config.to_dict().items() if k not in _NOT_OURS}
    spec["config"] = kept
    spec.setdefault("name", kept["model_type"])
    return spec, model
