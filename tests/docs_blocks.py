"""The blocks of code in the documentation: found, checked against what there is, and run.

`python tests/docs_blocks.py PAGE` runs a page's blocks in order, in the current folder; with
`--python` those in Python alone.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
#: What pages take for granted that explain and do not guide.
PRELUDE = """
import torch, mllm
model, processor = mllm.load_model("tiny-llava")
image = mllm.load_image("examples/scene.png")
inputs = mllm.build_inputs(processor, [([image], "what color is the diamond?")])
"""
_MISSING = object()


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: its file.
        line: of the opening fence, from 1.
        kind: what stands behind the fence.
        text: what stands in it.
        reason: why it is not run; None: it is.
        after: the text between the block and the one before it.
    """

    page: Path
    line: int
    kind: str
    text: str
    reason: str | None
    after: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, found, end = page.read_text(), [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1 + (match["reason"] is not None)
        before = text[end : match.start()]
        found.append(Block(page, line, match["kind"], match["text"], match["reason"], before))
        end = match.end()
    return found


def commands(block: Block) -> list[list[str]]:
    """Command lines of a block as words; what explains them, and shell syntax, is left out."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    # In the read-me words of explanation stand behind three spaces.
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in lines]
    plain = [line for line in lines if line and "$" not in line and not line.startswith("#")]
    if block.kind == "text":  # mostly what a command has said
        plain = [line for line in plain if line.startswith("mllm ")]
    return [shlex.split(line, comments=True) for line in plain]


def ours(words: list[str]) -> list[str] | None:
    """What a command gives to `mllm`; None is another program."""
    if words[:1] == ["mllm"]:
        return words[1:]
    return words[words.index("mllm.cli") + 1 :] if "mllm.cli" in words else None


def parse(words: list[str]) -> dict:
    """The parameters of a `mllm` command, by its own parser; fails as the command line does."""
    from mllm.cli import SUMMARIES, load_command

    name, *rest = words
    assert name in SUMMARIES, f"no command {name!r}"
    command = load_command(name)
    if hasattr(command, "commands"):
        if not rest:
            return {}
        sub, *rest = rest
        assert sub in command.commands, f"no command {name} {sub}"
        command = command.commands[sub]
    return command.make_context(name, list(rest)).params


def check_names(code: str, where: str) -> list[str]:
    """What of a piece of Python is not there: modules, names, parameters. Runs only its imports."""
    tree = ast.parse(code)
    known: dict = {"mllm": importlib.import_module("mllm")}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), where, "exec"), known)
            except ImportError as error:
                wrong.append(f"{where}: {error}")
    assigned = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }

    def value(node: ast.AST):
        """What a dotted name stands for; `_MISSING` if that is not known."""
        if isinstance(node, ast.Name):
            return _MISSING if node.id in assigned else known.get(node.id, _MISSING)
        if isinstance(node, ast.Attribute):
            owner = value(node.value)
            if inspect.ismodule(owner) or inspect.isclass(owner):
                if not hasattr(owner, node.attr):
                    wrong.append(f"{where}: {ast.unparse(node)} does not exist")
                return getattr(owner, node.attr, _MISSING)
        return _MISSING

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value(node)
        if isinstance(node, ast.Call) and (function := value(node.func)) is not _MISSING:
            wrong += _wrong_keywords(node, function, where)
    return sorted(set(wrong))


def _wrong_keywords(call: ast.Call, function: object, where: str) -> list[str]:
    try:
        takes = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return []
    name = ast.unparse(call.func)
    return [
        f"{where}: {name} has no parameter {k.arg!r}"
        for k in call.keywords
        if k.arg and k.arg not in takes
    ]


def run(page: Path, shell: bool = True) -> None:
    """Run a page's blocks in order: Python in one namespace, `mllm` commands in processes.

    Args:
        page: a Markdown file.
        shell: whether commands are run, and files written that the page says to save.
    """
    names: dict = {"__name__": "__page__"}
    if "tiny-llava" not in "".join(b.text for b in blocks(page) if b.kind == "python"):
        exec(compile(PRELUDE, "prelude", "exec"), names)
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.kind == "python":
            # Line numbers of the page, for the traceback.
            code = "\n" * block.line + block.text
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
        elif block.kind == "bash" and shell:
            for words in map(ours, commands(block)):
                if words is not None:
                    print(f"{block}: mllm {shlex.join(words)}", flush=True)
                    subprocess.run([sys.executable, "-m", "mllm", *words], check=True)
        elif block.kind == "yaml" and shell:
            for name in re.findall(r"[Ss]aved as `(\S+)`", _behind(block)):
                Path(name).write_text(block.text)


def _behind(block: Block) -> str:
    """The text between a block and the one that follows."""
    return next((b.after for b in blocks(block.page) if b.line > block.line), "")


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve(), "--python" not in sys.argv)
