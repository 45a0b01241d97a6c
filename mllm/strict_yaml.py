"""The YAML of recipes and sweeps: what cannot be meant is an error that names the line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from mllm.errors import MllmError


def parse(text: str, name: str, wrong: Callable[[str], MllmError]) -> Any:
    """YAML as plain objects.

    Numbers may be written as `2e-3`. A key that is given twice, or is a list or a mapping, is an
    error, and so is an alias within what it stands for. Aliases of one thing are one object.

    Args:
        text: the YAML.
        name: of its file, for messages.
        wrong: makes the error from its message.

    Raises:
        MllmError: the one that `wrong` makes; the message gives the line, where there is one.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        raise wrong(f"{name} is not valid YAML: {where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date that is none, as 2026-13-01
        raise wrong(f"{name} is not valid YAML: {str(error).splitlines()[0]}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-3 as a number (YAML 1.2) and refuses what cannot be meant.

    Nodes are checked as they are read: merging (`<<`) changes them later, in place.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        alias, anchor = isinstance(event, yaml.AliasEvent), event.anchor
        if alias and anchor in self._open:
            raise _fault(f"the alias *{anchor} is within what it stands for", event)
        if alias or anchor is None:
            return super().compose_node(parent, index)
        self._open.add(anchor)
        try:
            return super().compose_node(parent, index)
        finally:
            self._open.discard(anchor)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                raise _fault(f"a {kind} cannot be a key", key)
            if key.value in seen and key.value != "<<":
                raise _fault(f"the key {key.value!r} is given twice", key)
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _fault(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, at.start_mark)
