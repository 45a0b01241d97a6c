"""The reference from docstrings: every public name as Markdown. The site's reference page is this.

Usage: python -m scripts.api_doc > reference.md
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

#: Public modules, and of those without `__all__` the public names.
MODULES: dict[str, tuple[str, ...] | None] = {
    "mllm": None,
    "mllm.compressors.base": None,
    "mllm.compressors.kv_base": ("KVMethod",),
    "mllm.cache": None,
    "mllm.eval": None,
    "mllm.eval.sources": ("samples", "expand"),
    "mllm.yardstick": None,
    "mllm.models": ("families",),
    "mllm.models.towers": None,
    "mllm.views": ("with_tiles",),
    "mllm.kernels": ("use",),
    "mllm.roofline": ("Hardware", "device"),
    "mllm.routers.depth": ("DepthRouter",),
    "mllm.routers.arank": ("arank",),
    "mllm.routers.schedules": ("draw",),
    "mllm.routers.stats": ("plot",),
    "mllm.routers.experts_parallel": ("optimizer_groups",),
    "mllm.compressors": None,
    "mllm.routers": None,
}
#: Modules whose classes are methods: their parameters say everything, what they override nothing.
OF_METHODS = ("mllm.compressors", "mllm.routers")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$")
_ENTRY = re.compile(r"^(\*{0,2}[\w`\"'][\w\s,.*`\"'/]*?): (.*)$|^(\w+):$")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")


def names(module: str) -> list[str]:
    """Public names of a public module."""
    return list(MODULES[module] or importlib.import_module(module).__all__)


def docstring(thing: Any) -> str | None:
    """The docstring that a function or class has itself; None if it has none.

    Dataclasses make one of their own, which is none, and classes inherit theirs.
    """
    text = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if not text or (inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")):
        return None
    return inspect.cleandoc(text)


def members(cls: type) -> dict[str, Any]:
    """Public methods and properties that a class defines and documents itself."""
    found = {}
    for name, value in vars(cls).items():
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        function = value.fget if isinstance(value, property) else value
        ours = inspect.isfunction(function) and function.__module__.startswith("mllm")
        if ours and not name.startswith("_") and value.__doc__:
            found[name] = value
    return found


def markdown(text: str) -> str:
    """A docstring as Markdown: sections become lists, roles become code."""
    lines, out, inside = text.splitlines(), [], False
    for line in lines:
        section = _SECTION.match(line)
        if section:
            out += [f"**{section[1]}**", ""]
            inside = True
        elif not inside or (line and not line.startswith(" ")):
            inside = False
            out.append(line)
        else:
            out.append(_entry(line))
    made = _ROLE.sub(lambda found: f"`{found[1]}`", "\n".join(out))
    return re.sub(r"``([^`\n]+)``", r"`\1`", made)


def _entry(line: str) -> str:
    """A line of a section: `name: text` begins an entry, deeper lines continue it."""
    body = line[4:]
    found = _ENTRY.match(body) if not body.startswith(" ") else None
    if found is None:
        # Sections of one sentence (Returns) have no name; the first line is the entry.
        return f"    {body.strip()}" if body.startswith(" ") else body
    words = [f"`{word.strip(' `')}`" for word in (found[1] or found[3]).split(",")]
    return f"- {', '.join(words)}: {found[2] or ''}"


class _Plain(str):
    """An annotation that is shown without quotes."""

    __repr__ = str.__str__


def signature(name: str, thing: Any) -> str:
    """`name(parameters)` as one would write it."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    plain = [p.replace(annotation=_Plain(p.annotation)) if isinstance(p.annotation, str) else p
             for p in found.parameters.values()]  # fmt: skip
    returns = found.return_annotation
    returns = _Plain(returns) if isinstance(returns, str) else returns
    found = found.replace(parameters=plain, return_annotation=returns)
    return re.sub(r"\bmllm(\.\w+)+\.", "", f"{name}{found}")


def described(name: str, thing: Any, with_members: bool) -> list[str]:
    """The part of the page about one name."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return [f"### {name}", "", f"`{thing!r:.200}`", ""]
    out = [f"### {name}", "", "```text", signature(name, thing), "```", ""]
    out += [markdown(docstring(thing) or "*Not documented.*"), ""]
    for own, value in (members(thing) if with_members and inspect.isclass(thing) else {}).items():
        shown = own if isinstance(value, property) else signature(own, value)
        out += [f"#### {name}.{own}", "", "```text", shown, "```", ""]
        out += [markdown(inspect.cleandoc(value.__doc__)), ""]
    return out


def page() -> str:
    """The whole reference."""
    out = []
    for module in MODULES:
        here = importlib.import_module(module)
        out += [f"## {module}", ""]
        if here.__doc__ and MODULES[module] is None:
            out += [markdown(inspect.cleandoc(here.__doc__)), ""]
        for name in names(module):
            out += described(name, getattr(here, name), module not in OF_METHODS)
    return "\n".join(out)


if __name__ == "__main__":
    print(page())
