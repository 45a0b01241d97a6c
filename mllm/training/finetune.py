"""Fine-tuning an existing model: full or LoRA, with or without an active plan."""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

import mllm
from mllm import compat
from mllm.errors import DataError, RecipeError
from mllm.loading import load_model, load_processor
from mllm.plan import Plan
from mllm.routers import adapter as adapters
from mllm.routers import stats
from mllm.routers.experts_parallel import optimizer_groups
from mllm.training import parts
from mllm.training.data import Collator, Conversations
from mllm.training.distill import Teacher, distill_loss
from mllm.training.features import FeatureCache
from mllm.training.launch import deepspeed_config
from mllm.training.ordering import Order
from mllm.training.recipe import Recipe
from mllm.training.speed import Meter
from mllm.training.stages import ROUTERS
from mllm.training.trainer import (
    CheckpointTrainer,
    MetricsFile,
    Progress,
    StopOnSigterm,
    check_sealed,
    checkpoints,
    is_peft,
    newest_checkpoint,
    training_arguments,
)

# LoRA goes into every projection of the language model unless the recipe names its own targets;
# beside experts into those of the attention: FFNs are experts there.
LORA_TARGETS = r".*(language|text)_model.*\.(q|k|v|o|gate|up|down)_proj"
ATTENTION_TARGETS = r".*(language|text)_model.*\.(q|k|v|o)_proj"


def wrap_lora(model: Any, recipe: Recipe) -> Any:
    """The model with LoRA adapters; everything else is frozen.

    It comes before the plan, so what a plan puts into the model is learnt whole.

    Raises:
        RecipeError: PEFT refuses the configuration.
    """
    from peft import LoraConfig, get_peft_model

    stages = Plan.of(recipe.plan).stages if recipe.plan else []
    experts = any(stage.info.stage == "experts" for stage in stages)
    targets = ATTENTION_TARGETS if experts else LORA_TARGETS
    options = {"target_modules": targets, **(recipe.method.model_extra or {})}
    try:
        return get_peft_model(model, LoraConfig(**options))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"method: {error}",
            argument="method",
            given=options,
            expected="keys and values that peft.LoraConfig takes",
        ) from error


def check_four_bits() -> None:
    """Say why a base cannot be loaded in 4 bits here.

    Raises:
        RecipeError: no bitsandbytes, or no GPU.
    """
    missing = None
    if importlib.util.find_spec("bitsandbytes") is None:
        missing = "bitsandbytes is not installed"
    elif not torch.cuda.is_available():
        missing = "bitsandbytes trains in 4 bits on a GPU, and there is none"
    if missing:
        raise RecipeError(
            f"method.load_in_4bit cannot run here: {missing}",
            argument="method.load_in_4bit",
            given=True,
            expected="a GPU with bitsandbytes, or load_in_4bit: false (plain LoRA)",
        )


def _load(recipe: Recipe, device: str) -> tuple[Any, Any]:
    """The model and its processor as training starts from them."""
    path, dtype = recipe.model.path, recipe.model.dtype
    if not recipe.method.load_in_4bit:
        return parts.with_tower(recipe, *load_model(path, dtype=dtype, device=device))
    check_four_bits()
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, device_map={"": device}, quantization_config=four
    )
    again = bool(recipe.train.get("gradient_checkpointing"))
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=again)
    return base, load_processor(path)


class FinetuneTrainer(CheckpointTrainer):
    """Trains on conversations: order, learning rates, teacher and speed of a recipe.

    Args:
        recipe: the recipe.
        before: `parts.parts` of the model before adapters.
        teacher: None without distillation.
        meter: what measures the speed.
        patched: the plan at work; None is none.
    """

    def __init__(
        self, *args, recipe: Recipe, before: dict[str, str], teacher: Teacher | None, **kwargs
    ) -> None:
        self.recipe, self.before, self.teacher = recipe, before, teacher
        self.meter: Meter | None = None
        self._distilled = [0.0, 0.0, 0]
        self.patched: Any = None
        super().__init__(*args, **kwargs)

    @property
    def _spread(self) -> bool:
        """Whether processes share experts: DeepSpeed's own files have those of the first alone."""
        return self.recipe.parallel.ep_size > 1

    @property
    def _beside(self) -> bool:
        """Whether the plan learns something that PEFT does not save."""
        learns = self.patched is not None and bool(self.patched.routers)
        return is_peft(self.model) and learns and not self._spread

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self._beside:
            folder = Path(output_dir or self.args.output_dir)
            self.patched.save_adapter(folder / ROUTERS, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._beside:
            self.patched.load_adapter(Path(resume_from_checkpoint) / ROUTERS)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._spread:
            self.patched.save_adapter(Path(output_dir) / ROUTERS)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._spread and checkpoint is not None:
            self.patched.load_adapter(Path(checkpoint) / ROUTERS)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            trained = model or self.model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parts.groups(
                trained,
                self.before,
                self.recipe.learning_rates,
                self.args.learning_rate,
                self.get_decay_parameter_names(trained),
                self.args.weight_decay,
            )
            if self._spread:
                groups = optimizer_groups(groups)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None):
        data: Conversations = train_dataset or self.train_dataset
        group, args = self.recipe.sampling.group_by, self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths, kinds = data.sizes if group else (None, None)
        kinds = kinds if group == "modality" else None
        self._order = Order(len(data), seed, batch, lengths, kinds)
        return self._order

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        # Where several processes skip what a stopped run has seen, no loader hands the epoch on.
        self._order.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.patched is not None:  # a step begins, perhaps the first one after a stop
            before = self.state.global_step * self.args.gradient_accumulation_steps
            self.patched.learnt = before
        if self.meter is not None:
            epoch_iterator = self.meter.timed(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.meter is not None:
            self.meter.count(inputs)
        part = self.recipe.method.distill
        if part is None or self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        meant = self.teacher(inputs, bool(part.layers))
        inputs = {**inputs, "output_hidden_states": bool(part.layers)}
        loss, said = super().compute_loss(model, inputs, True, num_items_in_batch)
        soft, hidden = distill_loss(said, meant, inputs["labels"], part, num_items_in_batch)
        self._distilled = [
            self._distilled[0] + soft.detach(),
            self._distilled[1] + hidden.detach(),
            self._distilled[2] + 1,
        ]
        # The Trainer averages gradients over processes, and `items` counts those of all.
        counted = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes if counted else 1
        taught = scale * (soft + part.hidden_weight * hidden)
        # Auxiliary losses of a plan are beside both, and the plan has made the answers' share.
        joined = any(stage.info.trained for stage in self.patched.plan.stages)
        loss = (1 if joined else 1 - part.weight) * loss + part.weight * taught
        return (loss, said) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise self._diverged(float(loss))
        return loss

    def _diverged(self, loss: float) -> RecipeError:
        whole = checkpoints(Path(self.args.output_dir))
        kept = f"{whole[-1].name} is from before" if whole else "no checkpoint had been saved"
        return RecipeError(
            f"the loss became {loss} in step {self.state.global_step + 1}; {kept}",
            argument="train.learning_rate",
            given=self.args.learning_rate,
            expected="a smaller learning rate, more warmup_steps, or bf16 instead of fp16",
        )

    def log(self, logs, start_time=None) -> None:
        if "loss" in logs:
            if self.meter is not None:
                logs |= self.meter.read(self.args.world_size)
            if self.patched is not None:
                logs |= stats.numbers(self.patched.router_stats())
                losses = self.patched.losses.items()
                logs |= {f"loss_{name}": round(float(loss), 5) for name, loss in losses}
            soft, hidden, count = self._distilled
            if count:
                logs["distill"] = round(float(soft) / count, 5)
                if self.recipe.method.distill.layers:
                    logs["distill_hidden"] = round(float(hidden) / count, 5)
                self._distilled = [0.0, 0.0, 0]
        super().log(logs, start_time)


def finetune(
    recipe: Recipe,
    data: Conversations,
    folder: Path,
    resume: Path | bool,
    loaded: tuple[Any, Any] | None = None,
    metrics: MetricsFile | None = None,
) -> tuple[Any, Any] | None:
    """Train, and return the model (adapters merged in) and its processor.

    With `plan`, the model is patched during training, so it learns from the tokens that the plan
    leaves; the patch is gone from the model that is returned.

    Args:
        recipe: without `stages`.
        data: what `load_data` returned.
        folder: the run folder; checkpoints are `folder/checkpoint-N`. With LoRA the adapter alone
            is saved in `folder/adapter`.
        resume: False, True (newest whole checkpoint) or a checkpoint folder.
        loaded: model and processor to train instead of `recipe.model.path`.
        metrics: where logs go; None is `folder/metrics.jsonl`.

    Returns:
        None when SIGTERM stopped the run (a checkpoint was saved). Under ZeRO-3 only the first
        process has the weights.

    Raises:
        RecipeError, PlanError, DataError: see `mllm.training.recipe` and `mllm.patch`.
    """
    arguments = training_arguments(recipe.train, folder, deepspeed_config(recipe))
    base, processor = loaded or _load(recipe, str(arguments.device))
    set_seed(arguments.seed)  # now: reading a model in parts draws random numbers
    before = parts.parts(base)
    if recipe.model.reset_projector:
        parts.reset_projector(base)
    parts.freeze(base, recipe)
    teacher = Teacher(base) if recipe.method.distill else None
    lora = recipe.with_lora
    model = wrap_lora(base, recipe) if lora else base
    if teacher is not None:
        teacher.part_from(model)
    stop = StopOnSigterm()
    metrics = metrics or MetricsFile(folder / "metrics.jsonl")
    trainer = FinetuneTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(processor),
        train_dataset=data,
        callbacks=[metrics, Progress(metrics.stage or "train"), stop],
        recipe=recipe,
        before=before,
        teacher=teacher,
    )
    checkpoint = _checkpoint(folder, resume)
    kept = recipe.model.feature_cache
    features = FeatureCache(base, kept) if kept else None
    seats = parts.seats(model, before)
    zero = recipe.parallel.zero
    if zero and arguments.world_size > 1 and (zero == 3 or seats - {"language_model"}):
        trainer.data_collator.pictured = True  # processes wait for each other at the tower
    with (
        _patched(base, recipe) as patched,
        features.at_work() if features else nullcontext(),
    ):
        experts = patched is not None and bool(patched.experts)
        frozen = lora or not (experts or "language_model" in seats), "vision_tower" not in seats
        trainer.meter = Meter(base, patched, frozen, features)
        trainer.patched = patched
        if patched is not None:
            trainer.data_collator.tiles = patched.tiles
            if teacher is not None:
                patched.answers = 1 - recipe.method.distill.weight
        if loaded is None:
            _go_on(recipe, patched)
        # Autocast computes in half precision; DeepSpeed keeps fp32 weights of its own.
        mixed = (arguments.bf16 or arguments.fp16) and recipe.parallel.zero is None
        widened = parts.widen(model) if mixed else []
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        for parameter, dtype in widened:
            parameter.data = parameter.data.to(dtype)
        if patched is not None and patched.routers is not None and not stop.stopped:
            _keep_routers(recipe, trainer, patched, folder / ROUTERS)
    if stop.stopped:
        return None
    return _finished(recipe, trainer, base, folder), processor


def _patched(base: Any, recipe: Recipe) -> Any:
    """The plan at work, its experts shared by as many processes as the recipe says."""
    if not recipe.plan:
        return nullcontext()
    if recipe.parallel.ep_size > 1:
        return mllm.upcycle(base, recipe.plan, ep_size=recipe.parallel.ep_size)
    return mllm.patch(base, recipe.plan)


def _keep_routers(recipe: Recipe, trainer: FinetuneTrainer, patched: Any, folder: Path) -> None:
    """Save what the plan has learnt before it goes; all processes take part."""
    whole = None
    if recipe.parallel.zero == 3:
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.should_save or recipe.parallel.ep_size > 1:
        patched.save_adapter(folder, whole)  # where processes share experts, all are asked
    if trainer.args.should_save:
        if rows := patched.router_stats():  # learned tokens have none
            stats.plot(rows, folder.with_suffix(".png"))


def _go_on(recipe: Recipe, patched: Any) -> None:
    """Take up what the plan of the model's folder has learnt, as an earlier stage has left it."""
    path = recipe.model.path
    if not adapters.is_adapter(path) or adapters.is_adapter(recipe.plan):
        return
    if patched is None or patched.routers is None:
        if all(stage.scaffold for stage in Plan.of(path).stages if stage.info.trained):
            return
        raise RecipeError(
            f"{path} has what its plan has learnt, and this run would lose it",
            argument="plan",
            given=recipe.plan,
            expected=f"plan: {Plan.of(path).spec}",
        )
    patched.load_adapter(path)


def _finished(recipe: Recipe, trainer: FinetuneTrainer, base: Any, folder: Path) -> Any:
    """The trained model in one piece, adapters merged in; all processes take part."""
    lora, model = recipe.with_lora, trainer.model
    gathered = None
    if recipe.parallel.zero == 3:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        # Else transformers loads the next model in parts as well.
        compat.unset_hf_deepspeed_config()
    if not trainer.args.should_save:
        return base
    if lora:
        model.save_pretrained(folder / "adapter", state_dict=gathered)
    if gathered is None and not recipe.method.load_in_4bit:
        return (model.merge_and_unload() if lora else base).eval()
    # The model here is in parts, or in 4 bits: put the weights into a whole one.
    whole, _ = load_model(recipe.model.path, dtype=recipe.model.dtype, device="cpu")
    if lora:
        from peft import PeftModel

        return PeftModel.from_pretrained(whole, folder / "adapter").merge_and_unload().eval()
    whole.load_state_dict(gathered)
    return whole.eval()


def _checkpoint(folder: Path, resume: Path | bool) -> Path | None:
    if not isinstance(resume, Path):
        return newest_checkpoint(folder) if resume else None
    fault = check_sealed(resume)
    if fault:
        whole = newest_checkpoint(folder)
        raise DataError(
            f"{resume} {fault}",
            argument="resume",
            given=resume,
            expected=f"a whole checkpoint, such as {whole}" if whole else "--resume alone",
        )
    return resume
