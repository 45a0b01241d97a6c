"""Plans and adapters on the Hugging Face hub: the files that `save_pretrained` writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.errors import PlanError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def is_repo(name: Any) -> bool:
    """Whether this can be `user/name` on the hub: no folder, and no other path."""
    return isinstance(name, str) and bool(_REPO.fullmatch(name)) and not Path(name).exists()


def fetch(repo_id: str, files: Sequence[str], **options: Any) -> Path:
    """Download the files of a repository that it has; returns their folder.

    Args:
        repo_id: `user/name`.
        files: their names.
        **options: of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises:
        PlanError: there is no such repository, or no way to it.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(repo_id, allow_patterns=list(files), **options)
        )
    except _errors() as error:
        what = f"there is no folder {repo_id}, and the hub gave no such repository"
        raise _failed(what, error, repo_id) from error


def push(folder: Path, repo_id: str, private: bool | None = None, **options: Any) -> str:
    """Upload a folder, into a repository that is made if it is missing.

    Args:
        folder: what to upload.
        repo_id: `user/name`, or `name` of the user who is logged in.
        private: whether a new repository is; None is the account's setting.
        **options: of `HfApi.upload_folder`: `commit_message`, `revision`, `create_pr` and `token`.

    Returns:
        The address of the commit.

    Raises:
        PlanError: nobody is logged in, there is no way to the hub, or it refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="mllm", token=options.pop("token", None))
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        options.setdefault("commit_message", "Upload with mllm")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
    except _errors() as error:
        raise _failed(f"cannot upload to {repo_id}", error, repo_id) from error


def _errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HFValidationError, HTTPError

    return OSError, HTTPError, HFValidationError


def _failed(what: str, error: Exception, repo_id: str) -> PlanError:
    lines = str(error).splitlines() or [type(error).__name__]
    return PlanError(
        f"{what}: {lines[0]}",
        argument="repo_id",
        given=repo_id,
        expected="a repository user/name, a way to the hub, and `hf auth login` where it is "
        "private or written to",
    )
