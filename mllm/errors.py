"""Errors that a user can act on: each names the argument, what was given and what would work."""

from __future__ import annotations

from typing import Any


class MllmError(ValueError):
    """Base of every error that mllm raises on purpose.

    Args:
        message: one sentence for people.
        argument: name of the argument at fault.
        given: what was given.
        expected: what would work.
    """

    def __init__(
        self,
        message: str,
        *,
        argument: str | None = None,
        given: Any = None,
        expected: Any = None,
    ) -> None:
        super().__init__(message)
        self.argument, self.given, self.expected = argument, given, expected

    def as_dict(self) -> dict[str, Any]:
        """The `error` object of every `--json` output."""
        return {
            "type": type(self).__name__,
            "message": str(self),
            "argument": self.argument,
            "given": None if self.given is None else str(self.given),
            "expected": None if self.expected is None else str(self.expected),
        }


class PlanError(MllmError):
    """A plan that cannot be parsed, or cannot work on this model."""


class NoEffectError(MllmError):
    """Visual rows were present and a stage of the plan did not run."""


class RecipeError(MllmError):
    """A training recipe that cannot be run as written."""


class DataError(MllmError):
    """An image, a data set or a checkpoint that cannot be used."""


def unusable(argument: str, given: Any, done: str, expected: str) -> DataError:
    """The error for an argument with which something cannot be `done`, such as measured."""
    return DataError(
        f"{argument}={given} cannot be {done}; give {expected}",
        argument=argument,
        given=given,
        expected=expected,
    )


def first_line(error: BaseException) -> str:
    """What an exception says, in a line: the first that is not blank, or else its name."""
    lines = filter(None, map(str.strip, str(error).splitlines()))
    return next(lines, type(error).__name__)


class CacheMismatchError(MllmError):
    """A KV cache that does not belong to this model, plan or moment."""
