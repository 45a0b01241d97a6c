"""What the read-me shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "green" in said and "visual tokens 576 -> 128" in said


def test_commands_exist():
    from mllm.cli import SUMMARIES

    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^mllm (\w+) ", text, re.M))
    assert named and named <= set(SUMMARIES)
