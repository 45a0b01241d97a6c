"""Plans and adapters on the hub, through a stand-in of its client that keeps them in folders."""

from __future__ import annotations

import inspect
import shutil

import huggingface_hub
import pytest
import torch
from families import collate, model, samples
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from test_routers import PLAN, teach

import mllm
from mllm.errors import PlanError
from mllm.plan import Plan

REAL = huggingface_hub.HfApi


class Hub:
    """The real client's signatures; repositories are folders under `root`."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def api(self, **options):
        inspect.signature(REAL).bind(**options)
        self.calls.append(("HfApi", options))
        return self

    def create_repo(self, repo_id, **options):
        inspect.signature(REAL.create_repo).bind(self, repo_id, **options)
        self.calls.append(("create_repo", options))
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=options["exist_ok"])
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

    def upload_folder(self, **options):
        inspect.signature(REAL.upload_folder).bind(self, **options)
        self.calls.append(("upload_folder", options))
        target = self.root / options["repo_id"]
        shutil.copytree(options["folder_path"], target, dirs_exist_ok=True)
        return f"https://huggingface.co/{options['repo_id']}/commit/1"

    def snapshot_download(self, repo_id, **options):
        inspect.signature(REAL.snapshot_download).bind(self, repo_id, **options)
        self.calls.append(("snapshot_download", options))
        folder = self.root / repo_id
        if not folder.is_dir():
            raise OSError(f"404: {repo_id}")
        own = self.root / "downloaded" / repo_id
        own.mkdir(parents=True, exist_ok=True)
        for name in options["allow_patterns"]:
            if (folder / name).is_file():
                shutil.copy(folder / name, own)
        return str(own)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


def test_a_plan_there_and_back(hub):
    plan = Plan.from_spec("visionzip:keep=64+fastv:layer=2:keep=0.5", seed=7)
    address = plan.push_to_hub("me/plan", private=True, token="secret", commit_message="First")
    assert address.endswith("me/plan/commit/1")
    assert sorted(p.name for p in (hub.root / "me/plan").iterdir()) == [
        "README.md", "mllm_plan.json",
    ]  # fmt: skip
    assert plan.spec in (hub.root / "me/plan/README.md").read_text()
    calls = dict(hub.calls)
    assert calls["HfApi"]["token"] == "secret" and calls["create_repo"]["private"] is True
    assert calls["upload_folder"]["commit_message"] == "First"
    assert Plan.from_pretrained("me/plan", revision="main") == plan
    assert dict(hub.calls)["snapshot_download"]["revision"] == "main"
    Plan.from_spec("stride:keep=4").push_to_hub("plan")
    assert Plan.from_pretrained("me/plan").spec == "stride:keep=4", "of who is logged in"


def test_a_folder_goes_before_a_repository(hub, tmp_path):
    Plan.from_spec("stride:keep=4").save_pretrained(tmp_path / "me" / "plan")
    assert Plan.from_pretrained("me/plan").spec == "stride:keep=4" and not hub.calls
    for path in (tmp_path / "none", str(tmp_path / "none"), "none", "./me/none"):
        with pytest.raises(PlanError, match="cannot read"):
            Plan.from_pretrained(path)
    assert not hub.calls, "no path is asked of the hub"


@torch.no_grad()
def test_an_adapter_there_and_back(hub):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, PLAN) as patched:
        teach(net)
        trained = net(**inputs).logits
        patched.push_to_hub("me/adapter")
        saved = {k: v.clone() for k, v in net.mllm.state_dict().items()}
    other = model("llava")
    with mllm.patch(other, Plan.from_pretrained("me/adapter")) as patched:
        assert torch.equal(other(**inputs).logits, trained)
        assert all(torch.equal(saved[k], v) for k, v in other.mllm.state_dict().items())
        assert not any("know nothing" in note for note in patched.ledger.notes)
    with mllm.patch(other, PLAN) as patched:
        assert not torch.equal(other(**inputs).logits, trained)
        patched.load_adapter("me/adapter")
        assert torch.equal(other(**inputs).logits, trained)


def test_nothing_learnt_is_not_uploaded(hub):
    with mllm.patch(model("llava"), "stride:keep=4") as patched:
        with pytest.raises(PlanError, match="no trained parts"):
            patched.push_to_hub("me/adapter")
    assert not hub.calls


def test_what_the_hub_refuses(hub, monkeypatch):
    with pytest.raises(PlanError, match="no folder me/none.*404") as caught:
        Plan.from_pretrained("me/none")
    assert caught.value.argument == "repo_id" and "hf auth login" in caught.value.expected
    (hub.root / "me/empty").mkdir(parents=True)
    with pytest.raises(PlanError, match="cannot read .*mllm_plan.json"):
        Plan.from_pretrained("me/empty")

    def refuse(*_, **__):
        raise LocalTokenNotFoundError("Token is required, but no token found.")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(PlanError, match="cannot upload to me/plan: Token is required"):
        Plan.from_spec("stride:keep=4").push_to_hub("me/plan")
    assert issubclass(RepositoryNotFoundError, OSError)


def test_offline(tmp_path, monkeypatch):
    """The real client without a way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="cannot upload to me/plan"):
        Plan.from_spec("stride:keep=4").push_to_hub("me/plan", token="none")
    with pytest.raises(PlanError, match="no folder me/plan, and the hub gave no such"):
        Plan.from_pretrained("me/plan", cache_dir=tmp_path)
