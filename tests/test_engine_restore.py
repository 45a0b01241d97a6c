"""`remove()` gives back the very same model; models, threads and failures do not meet."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
from matrix import FEW, SIDE, anatomy, covering, fresh

import mllm
from mllm.errors import PlanError
from mllm.vision_hooks import VisionHooks

few = pytest.mark.parametrize("spec", FEW)


@covering(spec=FEW)
@torch.no_grad()
def test_remove_restores_everything(spec, attn):
    inputs = tiny.collate(tiny.samples(side=SIDE))
    model = fresh(attn)
    # transformers installs some of its own machinery on first use.
    plain = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    before = anatomy(model)

    patched = mllm.patch(model, spec)
    assert list(model.state_dict()) == before["keys"]
    assert not torch.equal(model(**inputs).logits, plain)
    model.generate(**inputs, max_new_tokens=5)
    patched.remove()

    assert anatomy(model) == before
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), answer)
    with pytest.raises(PlanError, match="removed before"):
        patched.remove()
    assert anatomy(model) == before, "a second remove() changes nothing"


@pytest.mark.parametrize("spec", ["fastv:layer=2:keep=0.5", "moellava"])
def test_a_patch_that_breaks_off_leaves_nothing(spec, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    model = fresh()
    before = anatomy(model)
    trained = [p.requires_grad for p in model.parameters()]
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(VisionHooks, "install", interrupted)
        mllm.patch(model, spec)
    assert anatomy(model) == before
    assert [p.requires_grad for p in model.parameters()] == trained
    mllm.patch(model, spec).remove()


@few
@torch.no_grad()
def test_context_manager_removes_on_error(spec):
    inputs = tiny.collate(tiny.samples(side=SIDE))
    model = fresh()
    plain, before = model(**inputs).logits, anatomy(model)
    with pytest.raises(RuntimeError, match="from the body"):
        with mllm.patch(model, spec):
            model(**inputs)
            raise RuntimeError("from the body")
    assert anatomy(model) == before
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("place", ["tower", "decoder", "after the cut"])
@few
@torch.no_grad()
def test_an_exception_inside_forward_leaves_nothing(spec, place):
    inputs = tiny.collate(tiny.samples(side=SIDE))
    model = fresh()
    plain, before = model(**inputs).logits, anatomy(model)
    broken = {
        "tower": model.model.multi_modal_projector,
        "decoder": model.model.language_model.layers[0].mlp,
        "after the cut": model.model.language_model.layers[3].mlp,
    }[place]

    def fail(*_):
        raise RuntimeError("broken on purpose")

    with mllm.patch(model, spec) as patched:
        good = model(**inputs).logits
        handle = broken.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            model(**inputs)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            model.generate(**inputs, max_new_tokens=2)
        # A text-only call in between must not see what the failed one had begun.
        handle.remove()
        text = tiny.collate(tiny.samples("text"))
        model(**text)
        assert patched.ledger.as_dict()["visual_tokens"] == [0, 0]
        assert torch.equal(model(**inputs).logits, good)
    assert anatomy(model) == before
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("spec", FEW[::-1])
def test_an_interrupted_training_step_leaves_nothing(spec):
    """Ctrl-C in a notebook: torch calls no hook after it, and work goes on with the model."""
    inputs = tiny.collate(tiny.samples(side=SIDE))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -9:] = inputs["input_ids"][:, -9:]
    model, other = fresh(), fresh()
    ids = torch.tensor([[1, 17, 23, 42, 61]])
    lm = model.model.language_model

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        alone = lm(input_ids=ids).last_hidden_state
    with mllm.patch(model, spec) as patched:
        with torch.no_grad():
            want = model(**inputs).logits
            kept = [k.tolist() for k in patched.ledger.kept(3)]
        for module in (model.model.multi_modal_projector, lm.layers[3].mlp):
            handle = module.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**inputs, labels=labels)
            handle.remove()
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, want), "its labels are forgotten"
                model.generate(**inputs, max_new_tokens=2)
            assert [k.tolist() for k in patched.ledger.kept(3)] == kept
        handle = lm.layers[3].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs, labels=labels)
        handle.remove()
        with mllm.patch(other, spec), torch.no_grad():
            assert torch.equal(other(**inputs).logits, want), "of other models too"
    with torch.no_grad():
        assert torch.equal(lm(input_ids=ids).last_hidden_state, alone)


@pytest.mark.parametrize("place", ["projector", "decoder", "head"])
@few
@torch.no_grad()
def test_the_parts_work_after_an_interrupt(spec, place):
    """Nothing of the interrupted forward is there when the decoder or base is called alone."""
    inputs = tiny.collate(tiny.samples(side=SIDE))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = fresh()
    lm, base = model.model.language_model, model.model
    ids = torch.tensor([[1, 17, 23, 42, 61]])
    alone = lm(input_ids=ids).last_hidden_state
    broken = {
        "projector": base.multi_modal_projector, "decoder": lm.layers[3].mlp, "head": model.lm_head
    }[place]

    def interrupt(*_):
        raise KeyboardInterrupt

    with mllm.patch(model, spec):
        want = base(**inputs).last_hidden_state
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        for call in (
            lambda: torch.equal(lm(input_ids=ids).last_hidden_state, alone),
            lambda: torch.equal(base(**inputs).last_hidden_state, want),
            lambda: torch.equal(
                model.generate(**inputs, max_new_tokens=3, do_sample=False), answer
            ),
        ):
            handle = broken.register_forward_pre_hook(interrupt)
            for run in (
                lambda: model(**inputs, labels=labels),
                lambda: model.generate(**inputs, max_new_tokens=3),
            ):
                with pytest.raises(KeyboardInterrupt):
                    run()
            handle.remove()
            assert call()


@few
@torch.no_grad()
def test_two_models_of_one_config(spec):
    """They share the config object; a patch on one is invisible to the other."""
    cfg = tiny.config(side=SIDE)
    one, two = tiny.llava(cfg=cfg, seed=1), tiny.llava(cfg=cfg, seed=2)
    inputs = tiny.collate(tiny.samples(side=SIDE))
    plain_one, plain_two, before = one(**inputs).logits, two(**inputs).logits, anatomy(two)
    with mllm.patch(one, spec):
        first = one(**inputs).logits
        assert torch.equal(two(**inputs).logits, plain_two)
        assert anatomy(two) == before
        with mllm.patch(two, "fastv:layer=1:keep=2"):
            second = two(**inputs).logits
            assert torch.equal(one(**inputs).logits, first)
        assert torch.equal(two(**inputs).logits, plain_two)
        assert not torch.equal(second, plain_two)
        # A model built from the same config while the patch is on is an ordinary model.
        late = tiny.llava(cfg=cfg, seed=2)
        assert torch.equal(late(**inputs).logits, plain_two)
    assert torch.equal(one(**inputs).logits, plain_one)


@pytest.mark.parametrize("spec", ["pyramiddrop:layers=1/2/3", "pmod"])
@torch.no_grad()
def test_a_copy_of_a_peft_model_is_one(spec):
    """PEFT's wrappers ask the model within for what they have not; it must not copy itself."""
    peft = pytest.importorskip("peft")
    inputs = tiny.collate(tiny.samples(side=SIDE))
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(fresh(), lora)
    plain = model(**inputs).logits
    with mllm.patch(model, spec):
        mine = model(**inputs).logits
        twin, inner = copy.deepcopy(model), copy.deepcopy(model.base_model)
    for copied, of in ((twin, model), (inner, model.base_model)):
        assert [type(m) for m in copied.modules()] == [type(m) for m in of.modules()]
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in of.parameters()}
        assert torch.equal(copied(**inputs).logits, plain)
    with mllm.patch(twin, spec):
        assert torch.equal(twin(**inputs).logits, mine)


@torch.no_grad()
def test_removal_in_any_order():
    cfg = tiny.config(side=SIDE)
    one, two = tiny.llava(cfg=cfg, seed=1), tiny.llava(cfg=cfg, seed=2)
    inputs = tiny.collate(tiny.samples(side=SIDE))
    plain = [m(**inputs).logits for m in (one, two)]
    before = [anatomy(m) for m in (one, two)]
    first, second = mllm.patch(one, FEW[-1]), mllm.patch(two, FEW[-1])
    first.remove()
    assert torch.equal(one(**inputs).logits, plain[0])
    second.remove()
    assert [anatomy(m) for m in (one, two)] == before
    assert torch.equal(two(**inputs).logits, plain[1])


@torch.no_grad()
def test_the_same_tower_and_decoder_may_be_called_alone():
    """Parts of a patched model that are called without it behave as unpatched."""
    model = fresh()
    ids = torch.tensor([[1, 17, 23, 42, 61]])
    lm, pixels = model.model.language_model, tiny.samples("alone", side=SIDE)[0].pixels
    plain = lm(input_ids=ids).last_hidden_state
    seen = model.model.vision_tower(pixels).last_hidden_state
    with mllm.patch(model, FEW[-1]):
        assert torch.equal(lm(input_ids=ids).last_hidden_state, plain)
        assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, seen)


@few
def test_two_threads(spec):
    """Forwards of one patched model in two threads do not meet."""
    model = fresh()
    batches = [tiny.collate(tiny.samples(side=SIDE, seed=s)) for s in (1, 2)]
    problems = []
    with mllm.patch(model, spec), torch.no_grad():
        alone = [model(**b).logits for b in batches]
        barrier = threading.Barrier(2)

        def work(i):
            barrier.wait()
            with torch.no_grad():
                for _ in range(15):
                    if not torch.equal(model(**batches[i]).logits, alone[i]):
                        problems.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not problems


@torch.no_grad()
def test_a_thread_does_not_see_what_another_reads():
    """While one thread projects only the query that PyramidDrop reads, another runs that layer."""
    model = fresh()
    inputs, other = (tiny.collate(tiny.samples(side=SIDE, seed=s)) for s in (1, 2))
    attention = model.model.language_model.layers[2].self_attn
    found = []

    def work():
        with torch.no_grad():
            found.append(model(**other).logits)

    def meanwhile(*_):
        if attention.q_proj._forward_hooks and not found and threading.active_count() == before:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    with mllm.patch(model, "pyramiddrop:layers=2:keep=0.5"):
        alone, before = model(**other).logits, threading.active_count()
        handle = attention.k_proj.register_forward_hook(meanwhile)
        model(**inputs)
        handle.remove()
    assert torch.equal(found[0], alone)


@torch.no_grad()
def test_a_second_patch_on_one_model_is_refused():
    model = fresh()
    inputs = tiny.collate(tiny.samples(side=SIDE))
    with mllm.patch(model, FEW[0]):
        logits = model(**inputs).logits
        with pytest.raises(PlanError):
            mllm.patch(model, FEW[1])
        assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
def test_a_plan_can_follow_another():
    model = fresh()
    inputs = tiny.collate(tiny.samples(side=SIDE))
    results = []
    for spec in [FEW[0], FEW[2], FEW[0]]:
        with mllm.patch(model, spec):
            results.append(model(**inputs).logits)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
