"""Put experts into a dense model, keep them as a small adapter, and take them out again."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm import compat
from mllm.errors import PlanError
from mllm.ledger import ExpertCost
from mllm.plan import PLAN_FILE, Plan
from mllm.routers.experts import ExpertLayer, Experts, Routing, loss_factor

if TYPE_CHECKING:
    from mllm.patcher import Patched

NAME = "mllm"
ADAPTER, WEIGHTS = "mllm_adapter.json", "mllm_adapter.safetensors"
FFN = ("gate_proj", "up_proj", "down_proj")


def upcycle(model: nn.Module, plan: Any, *, ep_size: int = 1) -> Patched:
    """Turn a dense model into one with experts: `mllm.patch` with a plan that has some.

    ```python
    patched = mllm.upcycle(model, "moellava:experts=4:top_k=2")
    patched.upcycled.train_only()            # or train the rest as well
    patched.upcycled.save(folder)            # an adapter; mllm.patch(model, folder) loads it
    ```

    Args:
        model: a dense model of a supported family.
        plan: as for :func:`mllm.patch`; further stages may stand beside the experts.
        ep_size: processes that share the experts of a layer (DeepSpeed, initialised before).

    Raises:
        PlanError: the plan has no experts, or cannot work on this model.
    """
    from mllm.patcher import Patched

    if not any(isinstance(stage, Experts) for stage in Plan.of(plan).stages):
        raise PlanError(
            "the plan has no experts",
            argument="plan",
            given=Plan.of(plan).spec,
            expected="moe, moellava, deepseekmoe, prmoe or vmoe",
        )
    return Patched(model, plan, ep_size=ep_size)


def adapter_in(plan: Any) -> Path | None:
    """The folder that a plan was given as, if it holds trained weights."""
    if isinstance(plan, str | os.PathLike) and (Path(plan) / ADAPTER).is_file():
        return Path(plan)
    return None


def _refuse(message: str, argument: str, given: Any, expected: str) -> None:
    raise PlanError(message, argument=argument, given=given, expected=expected)


class Upcycled:
    """The experts of a patched model.

    Attributes:
        layers: by 0-based decoder layer.
        routing: what the newest forward pass did, see :class:`mllm.routers.experts.Routing`.
    """

    def __init__(self, patched: Patched, ep_size: int = 1) -> None:
        self.patched, self.ep_size = patched, ep_size
        self.model, self.layers = patched.family.model, {}
        self.routing = Routing()
        self._dense: list[tuple[nn.Parameter, bool]] = []
        if not patched.experts:
            if ep_size != 1:
                _refuse("there are no experts to share", "ep_size", ep_size, "1, or such a plan")
            return
        places = self._check()
        self._group = None
        if ep_size > 1:
            from mllm.routers.experts_parallel import Group

            self._group = Group(ep_size)
        stages = {}
        for number, stage in patched.experts:
            made = {}
            for place, layer in enumerate(places[number]):
                made[str(layer)] = self._build(number, stage, layer, stage.count(place))
            stages[str(number)] = nn.ModuleDict(made)
        self.model.add_module(NAME, nn.ModuleDict(stages))

    def _check(self) -> dict[int, list[int]]:
        """Layers of every stage, if everything fits."""
        patched, family = self.patched, self.patched.family
        places = {n: s.at(len(patched.layers)) for n, s in patched.experts}
        every = list(itertools.chain(*places.values()))
        if len(set(every)) < len(every):
            twice = sorted({layer for layer in every if every.count(layer) > 1})
            _refuse(
                f"two stages put experts into the layers {twice}", "layers", twice,
                "every layer once",
            )  # fmt: skip
        for _, stage in patched.pruners:
            if "BranchRows" in stage.actions:
                _refuse(
                    f"{stage.info.name} lets rows skip FFNs, where experts choose their own",
                    "plan", patched.plan.spec, "one of the two",
                )  # fmt: skip
        for number, stage in patched.experts:
            for place, layer in enumerate(places[number]):
                experts, ffn = stage.count(place), family.mlp(layer)
                if experts % self.ep_size:
                    _refuse(
                        f"{experts} experts cannot be shared by {self.ep_size} processes evenly",
                        "ep_size", self.ep_size, f"a number that divides {experts}",
                    )  # fmt: skip
                parts = [getattr(ffn, name, None) for name in (*FFN, "act_fn")]
                dense = all(isinstance(p, nn.Linear) and p.bias is None for p in parts[:3])
                if None in parts or not dense:
                    _refuse(
                        f"the FFN of decoder layer {layer} is not a dense gated one without biases "
                        "(adapters on it must be merged first)",
                        "model", type(ffn).__name__, "gate_proj, up_proj, down_proj and act_fn",
                    )  # fmt: skip
        if any(p.is_meta and hasattr(p, "ds_id") for p in self.model.parameters()) or any(
            hasattr(p, "ds_status") for p in self.model.parameters()
        ):
            _refuse(
                "ZeRO-3 keeps parameters in parts, and the experts start from whole ones; "
                "DeepSpeed itself refuses native experts there",
                "model", "ZeRO-3", "ZeRO 0, 1 or 2",
            )  # fmt: skip
        if NAME in self.model._modules:
            _refuse(f"the model has a submodule {NAME!r} already", "model", NAME, "a plain model")
        return places

    def _build(self, number: int, stage: Experts, layer: int, experts: int) -> ExpertLayer:
        ffn = self.patched.family.mlp(layer)
        weights = {name: getattr(ffn, name).weight.detach() for name in FFN}
        draw = torch.Generator().manual_seed(self.patched.plan.seed_for(number, layer))
        own = range(experts) if self._group is None else self._group.own(experts)
        made = stage.build(layer, experts, own, weights, ffn.act_fn, draw)
        for p in ffn.parameters():  # not used while the experts are in
            self._dense.append((p, p.requires_grad))
            p.requires_grad_(False)
        if self._group is not None:
            self._group.share(made)
        made.train(ffn.training)
        self.layers[layer] = made
        return made

    def without(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """A model's submodules without the experts."""
        return {n: m for n, m in modules.items() if n != NAME or not self.layers}

    def remove(self) -> None:
        """Take the submodule out, and let the dense FFNs train as they did."""
        if self.layers:
            delattr(self.model, NAME)
        for parameter, trained in self._dense:
            parameter.requires_grad_(trained)
        self._dense = []

    def train_only(self) -> None:
        """Freeze all of the model but routers and experts."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(f"{NAME}."))

    def train_beside(self) -> None:
        """Train routers and experts beside what trains already (PEFT freezes what it finds)."""
        for layer in self.layers.values():
            layer.requires_grad_(True)

    def begin(self, model: nn.Module, labels: Tensor | None, given: dict[str, Any]) -> Routing:
        """The account of a forward pass."""
        learns = model.training and labels is not None and torch.is_grad_enabled()
        items = given.get("num_items_in_batch")
        self.routing = Routing(learns, loss_factor(labels, items) if learns else 1.0)
        return self.routing

    def costs(self, routing: Routing | None) -> dict[int, ExpertCost]:
        """What a ledger books for each layer."""
        found = {}
        for i, layer in self.layers.items():
            dropped = None
            if layer.stage.capacity_factor is not None and routing is not None:
                dropped = routing.stats[i]["dropped"]
            top_k = layer.stage.top_k
            found[i] = ExpertCost(layer.flops_row(), layer.flops_choice(), top_k, dropped)
        return found

    def statistics(self) -> list[dict[str, Any]]:
        """Of the newest forward pass, per layer with experts, plain Python values.

        `load` is the share of choices that each expert took, `entropy` that of the scores (nats,
        mean over rows), `dropped` the share of choices without room, `balance` and `z` the losses
        before their coefficients.
        """
        rows = []
        for i, stats in sorted(self.routing.stats.items()):
            load, n = stats["load"].tolist(), int(stats["rows"])
            choices = max(1, n * self.layers[i].stage.top_k)
            rows.append(
                {
                    "layer": i,
                    "load": [x / max(1, sum(load)) for x in load],
                    "entropy": float(stats["entropy"]),
                    "dropped": int(stats["dropped"].sum()) / choices,
                    "balance": float(stats["balance"]),
                    "z": float(stats["z"]),
                }
            )
        return rows

    # Adapters

    def _header(self) -> dict[str, Any]:
        config = self.patched.family.text_config
        return {
            "base_model": getattr(self.model.config, "_name_or_path", "") or None,
            "config_sha256": compat.config_sha256(self.model),
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "plan_sha256": self.patched.plan.sha256,
            "trained_dtype": str(next(iter(self.layers.values())).up_proj.dtype)[6:],
        }

    def state(self) -> dict[str, Tensor]:
        """Routers and all experts, by `mllm.<stage>.<param>`; all processes must ask."""
        found = {}
        for name, parameter in self.model.mllm.named_parameters():
            whole = parameter.detach()
            if self._group is not None and getattr(parameter, "allreduce", True) is False:
                whole = self._group.gathered(whole)
            found[f"{NAME}.{name}"] = whole.cpu().contiguous()
        return found

    def save(self, folder: str | os.PathLike) -> Path:
        """Write an adapter: plan, weights, header, README.md; `mllm.patch(model, folder)` reads it.

        Returns:
            The folder.
        """
        from safetensors.torch import save_file

        if not self.layers:
            _refuse("the plan has nothing trained", "plan", self.patched.plan.spec, "experts")
        folder, state = Path(folder), self.state()
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return folder
        self.patched.plan.save_pretrained(folder)
        fresh = folder / f"{WEIGHTS}.tmp"
        save_file(state, str(fresh))
        fresh.chmod(0o644)
        fresh.replace(folder / WEIGHTS)
        spec = self.patched.plan.spec
        size = sum(t.numel() for t in state.values())
        for name, text in (
            ("README.md", f"# Experts for a multimodal model\n\n`{spec}`, {size:,} parameters.\n\n"
             "```python\nmllm.patch(model, FOLDER)  # the model that it was trained on\n```\n"),
            (ADAPTER, json.dumps(self._header(), indent=2) + "\n"),
        ):  # fmt: skip
            fresh = folder / f"{name}.tmp"
            fresh.write_text(text)
            fresh.replace(folder / name)
        return folder

    def load(self, folder: str | os.PathLike) -> None:
        """Take the weights of an adapter, bit by bit.

        Raises:
            PlanError: it belongs to another plan, or to a model of another depth or width; or a
                file is missing or broken.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            header = json.loads((folder / ADAPTER).read_text())
            state = load_file(str(folder / WEIGHTS))
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise PlanError(
                f"cannot read the adapter in {folder}: {error}",
                argument="plan",
                given=folder,
                expected=f"a folder with {PLAN_FILE}, {ADAPTER} and {WEIGHTS}",
            ) from error
        own = self._header()
        fault = next(
            (
                (f"the adapter in {folder} is of {what}", key)
                for key, what in (
                    ("num_hidden_layers", "a model of another depth"),
                    ("hidden_size", "a model of another width"),
                    ("plan_sha256", "another plan"),
                )
                if header.get(key) != own[key]
            ),
            None,
        )
        mine = dict(self.model.mllm.named_parameters())
        if fault is None:
            shapes = {f"{NAME}.{n}": self._whole_shape(p) for n, p in mine.items()}
            if shapes != {name: tuple(t.shape) for name, t in state.items()}:
                fault = f"the adapter in {folder} has weights of other names or shapes", "weights"
        if fault is not None:
            raise PlanError(
                fault[0],
                argument=fault[1],
                given=header.get(fault[1]),
                expected=str(own.get(fault[1], "those of the plan")),
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                value = state[f"{NAME}.{name}"]
                if value.shape != parameter.shape:
                    value = value[self._group.own(len(value)).start :][: len(parameter)]
                parameter.copy_(value)

    def _whole_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        shared = getattr(parameter, "allreduce", True) is False
        first = len(parameter) * (self.ep_size if shared else 1)
        return (first, *parameter.shape[1:])
