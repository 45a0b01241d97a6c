"""What single methods promise: identity, budgets, seeds, and that what matters survives."""

from __future__ import annotations

import dataclasses

import families
import layer_oracle
import oracles
import pytest
import tiny
import torch
from matrix import CASES, LAYERS, LAYOUTS, SIDE, covering, equal, fresh, reference

import mllm
from mllm.plan import Plan, get_method

TOKENS = SIDE * SIDE
#: They must be trained; files of their own, or test_depth.py, hold them against their descriptions.
TRAINED = ["pmod", "mod", "mor", "gammamod", "moh", "skipffn", "layerskip", "dpn", "slowfast",
           "llavamini_fuse", "lookingtolearn", "croc"]  # fmt: skip
NAMES = ["random", "randomllm", "stride", "avgpool", "downsample", "visionzip", "divprune", "fastv"]
NAMES += ["pyramiddrop", "fastervlm", "prumerge", "prumergeplus", "sparsevlm", "hired", "vscan",
          "vscan_vision", "vscan_llm", "vtw", "feather", "vispruner", "dart", "cdpruner",
          "fitprune", "btp", "adaptivepool", "pyramid", "ggem", "pllava", "tome", "holov", "vmtc",
          "cmai", "topv", "zipvl", "zipvl_prefill", "pact", "windowmerge", "keytokens",
          "dualfilter", "mustdrop", "deepstack", *TRAINED, "m3", "mqt", "tokenflex",
          "tokenpacker", "videoccam", "dynamicvlm", "tcllava", "llavamini",
          "llavamini_compress"]  # fmt: skip
#: They choose without arithmetic, or at their identity choose nothing.
FREE = ["random", "randomllm", "stride", "avgpool", "downsample", "adaptivepool", "pyramid", "ggem",
        "pllava", "tome", "vmtc", "cmai", "windowmerge", "skipffn", "layerskip", "m3",
        "deepstack", "tcllava", "croc"]  # fmt: skip
#: Their size is no budget.
SIZED = ["adaptivepool", "pllava", "cmai", "vtw", "zipvl", "zipvl_prefill", "windowmerge",
         "keytokens", "dualfilter", "mustdrop", "deepstack", "tcllava", *TRAINED]  # fmt: skip
IDENTITY = {
    "random": "random:keep=1.0",
    "randomllm": "randomllm:layer=2:keep=1.0",
    "stride": "stride:keep=1.0",
    "avgpool": "avgpool:keep=1.0",
    "downsample": "downsample:keep=1.0",
    "visionzip": "visionzip:keep=1.0:cls=false:positions=original",
    "divprune": "divprune:keep=1.0",
    "fastv": "fastv:layer=2:keep=1.0",
    "topv": "topv:layer=2:keep=1.0",
    "pact": "pact:layer=2:keep=1.0:distance=0.0:proportional=false",
    "windowmerge": "windowmerge:share=0.0",
    "keytokens": "keytokens:share=0.08",
    "dualfilter": "dualfilter:together=0.0:alone=0.0",
    "mustdrop": "mustdrop:together=0.0:alone=0.0:share=0.0",
    "zipvl": "zipvl:tau=1.0:high=16:low=16",
    "zipvl, evicting": "zipvl:tau=1.0:evict=true",
    "zipvl_prefill": "zipvl_prefill:tau=1.0",
    "vmtc": "vmtc:keep=1.0:primary=1.0",
    "cmai": "cmai:share=0.0",
    "holov": "holov:keep=1.0",
    "tome": "tome:keep=1.0",
    "adaptivepool": "adaptivepool:grid=1024/1024",
    "pyramid": "pyramid:keep=1.0:count=1",
    "ggem": "ggem:keep=1.0:p=1.0",
    "pllava": "pllava:frames=1024:grid=1024/1024",
    "cdpruner": "cdpruner:keep=1.0",
    "dart": "dart:layer=2:keep=1.0",
    "visionzip+fastv": "visionzip:keep=1.0:cls=false:positions=original+fastv:layer=2:keep=1.0",
    "fastv+fastv": "fastv:layer=1:keep=1.0+fastv:layer=3:keep=1.0",
    "pyramiddrop": "pyramiddrop:keep=1.0/1.0/1.0",
    "fastervlm": "fastervlm:keep=1.0",
    "prumerge": "prumerge:keep=1.0:merge=none:positions=original",
    "prumergeplus": "prumergeplus:keep=1.0:merge=none:positions=original",
    "sparsevlm": "sparsevlm:keep=1.0/1.0/1.0",
    "sparsevlm, version 2.0": "sparsevlm:version=2.0:keep=1.0/1.0/1.0",
    "hired": "hired:keep=1.0",
    "vscan": "vscan:keep=1.0",
    "vscan_vision": "vscan_vision:keep=1.0",
    "vscan_llm": "vscan_llm:keep=1.0",
    "fitprune": "fitprune:keep=" + "/".join(["1.0"] * 13),
    "btp": "btp:keep=1.0/1.0/1.0:end=0",
    "feather": "feather:layers=1/3:keep=1.0/1.0",
    "vispruner": "vispruner:keep=1.0",
    "pmod": "pmod:max_ratio=1.0:min_ratio=1.0",
    "mod": "mod:capacity=1.0:gate=tanh",
    "mor": "mor:least=1.0",
    "moh": "moh:active=1.0",
    "skipffn": "skipffn:budget=1.0:summary=false",
    "layerskip": "layerskip",
    "m3": "m3:keep=576",
    "dpn": "dpn:choice=0/0/0",
    "deepstack": "deepstack",
    "slowfast": "slowfast",
    "lookingtolearn": "lookingtolearn",
    "croc": "croc",
    "tcllava": "tcllava:gamma=0.0:mask=false",
    "fastv, as a number": f"fastv:layer=2:keep={TOKENS}",
}


def test_every_method_is_here():
    # Those on the cache are in test_kv.py, experts in test_experts.py.
    rows = [row for row in mllm.methods() if row["stage"] not in ("cache", "experts")]
    assert sorted(row["name"] for row in rows) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_declared_identity_is_the_one_tested(name):
    """What a method declares as its identity is a plan of this file."""
    declared = get_method(name).identity
    if declared is None:
        # Tokens of their own.
        learnt = ("mqt", "tokenflex", "tokenpacker", "videoccam", "dynamicvlm", "llavamini",
                  "llavamini_compress", "llavamini_fuse")  # fmt: skip
        assert name in ("vtw", "gammamod", *learnt), "methods that never keep everything"
        return
    stage = Plan.from_spec(IDENTITY[name]).written[0]
    assert all(getattr(stage, k) == v for k, v in declared.items())


@covering(spec=list(IDENTITY.values()), layout=[*LAYOUTS, "text-left"])
@torch.no_grad()
def test_identity(spec, layout, attn):
    """Bit-equal logits and answers, though the stage did run."""
    kind, side = layout.split("-")
    inputs = tiny.collate(tiny.samples(kind, side=SIDE), side)
    model = fresh(attn)
    options = dict(
        max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    plain, answer = model(**inputs).logits, model.generate(**inputs, **options)
    with mllm.patch(model, spec) as patched:
        real = inputs["attention_mask"].bool()
        assert torch.equal(model(**inputs).logits[real], plain[real])
        ledger = patched.ledger.as_dict()
        mine = model.generate(**inputs, **options)
    assert torch.equal(mine.sequences, answer.sequences)
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, answer.logits, strict=True))
    assert ledger["kept_llm"] == ledger["visual_tokens"]
    if kind != "text" and spec.split(":")[0] not in FREE:
        # Not short-circuited: the selection was paid for.
        assert max(ledger["selection_flops"]) > 0


@pytest.mark.parametrize(
    "spec",
    [
        "random:keep={}",
        "randomllm:layer=2:keep={}",
        "stride:keep={}",
        "divprune:keep={}",
        "cdpruner:keep={}",
        "vmtc:keep={}",
        "holov:keep={}",
        "visionzip:keep={}",
        "fastv:layer=1:keep={}",
        "dart:layer=1:keep={}",
    ],
)
@pytest.mark.parametrize("keep", [1, 2, 7, 15, 16, "0.01", "0.3", "0.5", "0.99", "1.0"])
@torch.no_grad()
def test_budgets_are_met_per_image(spec, keep):
    model = fresh()
    spec = spec.format(keep)
    per_image = keep if isinstance(keep, int) else max(1, round(float(keep) * TOKENS))
    with mllm.patch(model, spec) as patched:
        model(**tiny.collate(tiny.samples(side=SIDE)))
        kept = [len(k) for k in patched.ledger.kept(LAYERS - 1)]
    if spec.startswith(("fastv", "dart", "randomllm")) and not isinstance(keep, int):
        # A fraction of all the visual rows that arrive.
        assert kept == [per_image, max(1, round(float(keep) * 2 * TOKENS)), 0]
    else:
        assert kept == [per_image, 2 * per_image, 0]


@pytest.mark.parametrize("name", ["avgpool", "downsample"])
@pytest.mark.parametrize("keep", [1, 2, 4, 8, 9, 15, 16])
@torch.no_grad()
def test_grids_stay_within_the_budget(name, keep):
    model = fresh()
    with mllm.patch(model, f"{name}:keep={keep}") as patched:
        model(**tiny.collate(tiny.samples(side=SIDE)))
        kept = patched.ledger.kept("llm")
    small = oracles.grid_for(keep, SIDE)
    cells = oracles.cells(SIDE, small)
    assert keep / 2 < len(cells) <= keep
    assert [len(k) for k in kept] == [len(cells), 2 * len(cells), 0]
    for tokens, seat in zip(cells, kept[0].tolist(), strict=True):
        assert seat in tokens, "a pooled token sits in the area that it stands for"


@torch.no_grad()
def test_stride_is_even_and_blind():
    model = fresh()
    one, two = (tiny.collate(tiny.samples("alone", side=SIDE, seed=s)) for s in (1, 2))
    for keep in range(1, TOKENS + 1):
        with mllm.patch(model, f"stride:keep={keep}") as patched:
            model(**one)
            kept = patched.ledger.kept("llm")[0]
            model(**two)
            assert torch.equal(patched.ledger.kept("llm")[0], kept)
        gaps = kept.diff().tolist()
        assert len(kept) == keep
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert abs(float(kept.float().mean()) - (TOKENS - 1) / 2) <= 1


@pytest.mark.parametrize("spec", ["random:keep=4", "randomllm:layer=2:keep=4"])
@torch.no_grad()
def test_random_follows_the_seed_and_nothing_else(spec):
    model = fresh()
    batch = tiny.samples(side=SIDE)
    inputs = tiny.collate(batch)

    def kept(seed, count, inputs=inputs):
        with mllm.patch(model, Plan.from_spec(spec, seed=seed)) as patched:
            torch.manual_seed(count)
            model(**inputs)
            state = torch.get_rng_state()
            torch.manual_seed(count)
            assert torch.equal(torch.get_rng_state(), state), "the global generator is not used"
            return [k.tolist() for k in patched.ledger.kept(LAYERS - 1)]

    assert kept(0, 1) == kept(0, 2)
    assert kept(0, 1) != kept(1, 1)
    for row, sample in enumerate(batch):
        assert kept(0, 1, tiny.collate([sample]))[0] == kept(0, 1)[row], "the batch draws along"
    if not spec.startswith("randomllm"):
        first, second = kept(0, 1)[1][:4], kept(0, 1)[1][4:]
        assert first != [t - TOKENS for t in second], "images draw apart"


@pytest.mark.parametrize("spec", ["random:keep=4", "randomllm:layer=2:keep=4"])
@torch.no_grad()
def test_random_is_uniform(spec):
    """Over many seeds every token is kept about equally often."""
    model = fresh()
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    counts = torch.zeros(TOKENS)
    for seed in range(100):
        with mllm.patch(model, Plan.from_spec(spec, seed=seed)) as patched:
            model(**inputs, logits_to_keep=1)
            counts[patched.ledger.kept(LAYERS - 1)[0]] += 1
    # Expected 25 each with a deviation of 4.3: five deviations.
    assert counts.min() > 3 and counts.max() < 47


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_dropping_at_random_in_the_llm_equals_masking(family):
    batch = families.samples(family)
    inputs = families.collate(family, batch)
    with mllm.patch(families.model(family), "randomllm:layer=2:keep=3") as patched:
        logits = tiny.per_sample(
            patched.model(**inputs).logits[:, -1:], inputs["attention_mask"][:, -1:]
        )
        kept = patched.ledger.kept(2)
    for row, sample in enumerate(batch):
        places = sample.visual.nonzero()[:, 0]
        gone = sample.visual.clone()
        gone[places[kept[row]]] = False
        want = layer_oracle.run(family, sample, layer_oracle.Edits(drop={2: gone})).logits[-1:]
        assert not sample.pictures or gone.any()
        equal(logits[row], want, f"sample {row}")


@pytest.mark.parametrize(
    "spec", [s for s in CASES if s.startswith(("visionzip:keep=10", "visionzip:keep=8"))]
)
@torch.no_grad()
def test_visionzip_accounts_for_every_token(spec):
    model = fresh()
    sample = tiny.samples("alone", side=SIDE)[0]
    with mllm.patch(model, spec) as patched:
        model(**tiny.collate([sample]))
        into, kept = patched.ledger.merged_into[0], patched.ledger.kept("llm")[0]
    stage = Plan.from_spec(spec).stages[0]
    block = oracles.visionzip(reference(), sample.pixels[0], stage.keep, positions=stage.positions)
    assert into.tolist() == block.into
    assert kept.tolist() == sorted(block.seat)
    assert all((into[t] == t) == (t in block.seat) for t in range(TOKENS))


@pytest.mark.parametrize(
    "total, dominant, contextual", [(192, 162, 30), (128, 108, 20), (64, 54, 10)]
)
@torch.no_grad()
def test_visionzip_has_the_published_split(total, dominant, contextual):
    """54 + 10, 108 + 20 and 162 + 30 of 576 tokens, [CLS] counted as dominant."""
    model = tiny.llava(layers=1, side=24)
    sample = tiny.samples("alone", side=24)[0]
    block = oracles.visionzip(model, sample.pixels[0], total)
    with mllm.patch(model, f"visionzip:keep={total}") as patched:
        model(**tiny.collate([sample]), logits_to_keep=1)
        into = patched.ledger.merged_into[0]
        assert len(patched.ledger.kept("llm")[0]) == total
    receivers = {int(t) for i, t in enumerate(into) if t != i and t >= 0}
    assert into.tolist() == block.into
    assert len(block.seat) == total and len(block.features) == total
    assert dominant + contextual == total and len(receivers) <= contextual


@pytest.mark.parametrize("target", [0, 5, 10, 15])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_visionzip_keeps_what_cls_looks_at(target, attn):
    """A patch whose key is made to match the [CLS] query is dominant."""
    model = fresh(attn)
    sample = tiny.samples("alone", side=SIDE)[0]
    net = model.model.vision_tower
    net = getattr(net, "vision_model", net)
    attention = net.encoder.layers[-2].self_attn
    hidden = {}
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: hidden.update(
            x=(args[0] if args else kwargs["hidden_states"])[0].clone()
        ),
        with_kwargs=True,
    )
    model.model.vision_tower(sample.pixels)
    handle.remove()
    x = hidden["x"]
    # A rank-one change of the key projection that fires on this patch alone.
    others = torch.cat([x[: target + 1], x[target + 2 :]])
    own = x[target + 1] - others.T @ torch.linalg.lstsq(others.T, x[target + 1]).solution
    query = attention.q_proj(x[0])
    attention.k_proj.weight += 60 * torch.outer(query / query.norm(), own / (own @ own))
    with mllm.patch(model, "visionzip:keep=3:dominant=0.67") as patched:
        model(**tiny.collate([sample]))
        kept = patched.ledger.kept("llm")[0].tolist()
        assert patched.ledger.merged_into[0][target] == target
    assert target in kept


@pytest.mark.parametrize("target", [0, 6, 15])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_fastv_keeps_what_the_question_asks_for(target, attn):
    """A visual token whose key is aligned with the last query survives the hardest cut."""
    model = fresh(attn)
    sample = tiny.samples("alone", side=SIDE)[0]
    inputs = tiny.collate([sample])
    layer = model.model.language_model.layers[1]
    hidden = {}
    handle = layer.input_layernorm.register_forward_hook(
        lambda _, args, out: hidden.update(x=out[0].clone())
    )
    model(**inputs)
    handle.remove()
    x = hidden["x"]
    row = int(sample.visual.nonzero()[target, 0])
    lm, a = model.model.language_model, layer.self_attn
    # The unrotated key at `row` whose rotation is the (rotated) query of the last row.
    cos, sin = lm.rotary_emb(x[None], position_ids=torch.arange(len(x))[None])
    dim = a.head_dim
    query = a.q_proj(x[-1]).view(-1, dim)
    query = oracles.rotate(query, cos[0, -1], sin[0, -1])
    wanted = oracles.rotate(query, cos[0, row], -sin[0, row])[::2].flatten()
    others = torch.cat([x[:row], x[row + 1 :]])
    own = torch.linalg.lstsq(
        torch.cat([x[row][None], others]),
        torch.cat([torch.ones(1, 1), torch.zeros(len(others), 1)]),
    ).solution[:, 0]
    a.k_proj.weight += 40 * torch.outer(wanted / wanted.norm(), own)
    with mllm.patch(model, "fastv:layer=2:keep=1") as patched:
        model(**inputs)
        assert patched.ledger.kept(2)[0].tolist() == [target]


@pytest.mark.parametrize("odd", [2, 9])
@torch.no_grad()
def test_divprune_keeps_the_odd_one_out(odd):
    """Of a uniform picture with one different patch, that patch is chosen."""
    model = fresh()
    sample = tiny.samples("alone", side=SIDE)[0]
    projector = model.model.multi_modal_projector
    base = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def flat(_, args):
        noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
        x = base + 0.01 * noise
        x[:, odd] = -base
        return (x,)

    handle = projector.register_forward_pre_hook(flat)
    with mllm.patch(model, "divprune:keep=2") as patched:
        model(**tiny.collate([sample]))
        assert odd in patched.ledger.kept("llm")[0].tolist()
    handle.remove()


@pytest.mark.parametrize("count", [2, 5, 11])
@torch.no_grad()
def test_divprune_equals_its_description(count):
    model = fresh()
    batch = tiny.samples(side=SIDE)
    with mllm.patch(model, f"divprune:keep={count}") as patched:
        model(**tiny.collate(batch))
        kept = patched.ledger.kept("llm")
    for b, sample in enumerate(batch):
        want = []
        for i, picture in enumerate(sample.pixels):
            x = oracles.project(reference(), oracles.tower(reference(), picture).patches)
            want += [TOKENS * i + t for t in oracles.divprune(x, count)]
        assert kept[b].tolist() == want


@torch.no_grad()
def test_fastv_scales_its_paper_s_layer():
    """Without `layer` the paper's 2 of 32 is scaled, never below the first possible layer."""
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    for layers, cut in [(4, 1), (16, 1), (32, 2)]:
        model = tiny.llava(layers=layers, side=SIDE)
        with mllm.patch(model, "fastv:keep=0.5") as patched:
            model(**inputs)
            visual = [row["visual"][0] for row in patched.ledger.as_dict()["layers"]]
        assert visual == [TOKENS] * cut + [TOKENS // 2] * (layers - cut)


def test_methods_are_small_dataclasses():
    for name in NAMES:
        cls = get_method(name)
        assert dataclasses.is_dataclass(cls)
        assert ("keep" in {f.name for f in dataclasses.fields(cls)}) is (name not in SIZED)
        assert cls.oracle in ("mask", "rebuild", "reference")
