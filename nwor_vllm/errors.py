"""The errors a user can cause or must act on. Each message is one line: what is wrong, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NworError(Exception):
    """Anything that ends a command with one line instead of a traceback."""

    exit_code = 1


class ConfigError(NworError):
    """A setting, flag or file that contradicts itself or does not exist.

    No ValueError: vLLM's configuration is pydantic's, which buries those in its own report of several lines.
    """

    exit_code = 2


class CorruptFileError(NworError):
    """A file of ours that is damaged, foreign or of another version."""


class MissingError(NworError):
    """A program, package, model or file that is needed and absent."""


def unknown_key(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    """The one wording for a name that does not exist."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names)}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}")
