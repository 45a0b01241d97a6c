"""Put experts into a dense model, and take them out again."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm.errors import PlanError
from mllm.ledger import ExpertCost
from mllm.plan import Plan
from mllm.routers.account import Routing
from mllm.routers.base import active
from mllm.routers.experts import ExpertLayer, Experts

if TYPE_CHECKING:
    from mllm.patcher import Patched

FFN = ("gate_proj", "up_proj", "down_proj")


def upcycle(model: nn.Module, plan: Any, *, ep_size: int = 1) -> Patched:
    """Turn a dense model into one with experts: `mllm.patch` with a plan that has some.

    ```python
    patched = mllm.upcycle(model, "moellava:experts=4:top_k=2")
    patched.train_routers(alone=True)        # or train the rest as well
    patched.save_adapter(folder)             # mllm.patch(model, folder) loads it
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
            expected="moe, moellava, deepseekmoe, bigmac, prmoe or vmoe",
        )
    return Patched(model, plan, ep_size=ep_size)


def _refuse(message: str, argument: str, given: Any, expected: str) -> None:
    raise PlanError(message, argument=argument, given=given, expected=expected)


class Upcycled:
    """The experts of a patched model, and the dense FFNs behind them.

    Args:
        patched: the model; its plan may have no experts.
        ep_size: processes that share the experts of a layer.

    Attributes:
        places: by 0-based decoder layer with experts, the number of their stage.
        parts: by stage and layer, the modules as they start.
    """

    def __init__(self, patched: Patched, ep_size: int = 1) -> None:
        self.patched, self.ep_size = patched, ep_size
        self.parts: dict[int, dict[str, nn.Module]] = {}
        self.places: dict[int, int] = {}
        self._dense: list[tuple[nn.Parameter, bool]] = []
        self._group = None
        if not patched.experts:
            if ep_size != 1:
                _refuse("there are no experts to share", "ep_size", ep_size, "1, or such a plan")
            return
        places = self._check()
        if ep_size > 1:
            from mllm.routers.experts_parallel import Group

            self._group = Group(ep_size)
        for number, stage in patched.experts:
            self.parts[number] = {
                str(layer): self._build(number, stage, layer, stage.count(place))
                for place, layer in enumerate(places[number])
            }

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
        if any(hasattr(p, "ds_status") for p in family.model.parameters()):
            _refuse(
                "ZeRO-3 keeps parameters in parts, and the experts start from whole ones; "
                "DeepSpeed itself refuses native experts there",
                "model", "ZeRO-3", "ZeRO 0, 1 or 2",
            )  # fmt: skip
        return places

    def _build(self, number: int, stage: Experts, layer: int, experts: int) -> ExpertLayer:
        ffn = self.patched.family.mlp(layer)
        weights = {name: getattr(ffn, name).weight.detach() for name in FFN}
        draw = torch.Generator().manual_seed(self.patched.plan.seed_for(number, layer))
        own = range(experts) if self._group is None else self._group.own(experts)
        made = stage.build(layer, experts, own, weights, ffn.act_fn, draw)
        made.number, self.places[layer] = number, number
        for p in ffn.parameters():  # not used while the experts are in
            self._dense.append((p, p.requires_grad))
            p.requires_grad_(False)
        if self._group is not None:
            self._group.share(made)
        return made

    @property
    def layers(self) -> dict[int, ExpertLayer]:
        """What is in the model, by decoder layer, also where PEFT trains a copy."""
        bank = active(self.patched.family.model) if self.places else None
        return {i: bank._modules[str(n)][str(i)] for i, n in self.places.items()}

    def remove(self) -> None:
        """Let the dense FFNs train as they did."""
        for parameter, trained in self._dense:
            parameter.requires_grad_(trained)
        self._dense = []

    def costs(self, routing: Routing | None) -> dict[int, ExpertCost]:
        """What a ledger books for each layer."""
        found = {}
        for i, layer in self.layers.items():
            dropped = None
            if layer.stage.capacity_factor is not None and routing is not None:
                dropped = routing.stats[layer.number, i]["dropped"]
            top_k = layer.stage.top_k
            found[i] = ExpertCost(layer.flops_row(), layer.flops_choice(), top_k, dropped)
        return found

    # Experts of other processes

    def _shared(self, parameter: Tensor) -> bool:
        """Whether this process has a part of a parameter."""
        return self._group is not None and getattr(parameter, "allreduce", True) is False

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of a parameter with the experts of all processes."""
        first = len(parameter) * (self.ep_size if self._shared(parameter) else 1)
        return (first, *parameter.shape[1:])

    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:
        """`value` of a parameter with the experts of all processes, which all must ask."""
        return self._group.gathered(value) if self._shared(parameter) else value

    def own(self, parameter: Tensor, value: Tensor) -> Tensor:
        """What this process has of a whole value."""
        if not self._shared(parameter):
            return value
        return value[self._group.own(len(value)).start :][: len(parameter)]
