"""`mllm.patch`: the one verb. Imports torch only when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm.patcher import Patched


def patch(model: Any, plan: Any, *, unvalidated: bool = False) -> Patched:
    """Run a plan inside a Hugging Face vision-language model, until it is removed.

    ```python
    with mllm.patch(model, "visionzip:keep=64") as patched:
        out = model.generate(**inputs, max_new_tokens=64)
        print(patched.ledger)
    ```

    The model keeps its class, its weights, its `state_dict` keys and its way of being called.
    Other models, also those that share a config object, are not touched.

    Args:
        model: a model of a supported family (:func:`mllm.models.families`).
        plan: stage instances, a :class:`mllm.Plan`, spec text, or a folder with
            ``mllm_plan.json``.
        unvalidated: also allow what was written but never run by its authors (row capture
            under flash attention).

    Returns:
        A context manager with `.ledger`, `.plan` and `.remove()`.

    Raises:
        PlanError: the plan cannot work on this model; the model is unchanged.
    """
    from mllm.patcher import Patched

    return Patched(model, plan, unvalidated=unvalidated)
