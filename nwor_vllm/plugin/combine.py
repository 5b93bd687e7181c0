"""A scheduler or worker extension of the user's own keeps its work: ours is put in front of it.

vLLM hands classes to its processes by name, so the pair has a name too, `our.module.OurClass+their:module:Class`. The
module of our class makes the pair when that name is looked up in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nwor_vllm.plugin import compat


def name_of(ours: str, theirs: str | type[Any]) -> str | type[Any]:
    """What to give vLLM. Theirs may be a class, as in `LLM(scheduler_cls=Mine)`."""
    if isinstance(theirs, type) and "." in theirs.__qualname__:
        compat.log.warning(
            "nwor: draft lengths are vLLM's own: %r is no class of a module's top level; move it there", theirs
        )
        return theirs
    path = theirs if isinstance(theirs, str) else f"{theirs.__module__}.{theirs.__qualname__}"
    return path if path.startswith(ours.rpartition(".")[0]) else f"{ours}+{path.replace('.', ':')}"


def lookup(module: str, ours: type[Any], base: type[Any] = object) -> Callable[[str], Any]:
    """A module's `__getattr__`. What does not derive from `base` is left alone, with one log line."""

    @functools.cache
    def find(name: str) -> Any:
        _, plus, path = name.partition("+")
        if not plus:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        theirs = compat.resolve(":".join(path.replace(":", ".").rsplit(".", 1)))[2]
        if issubclass(theirs, ours):
            return theirs
        if not issubclass(theirs, base):
            compat.log.warning(
                "nwor: %s does not derive from %s.%s: draft lengths, counters and run-time control are off",
                path.replace(":", "."), base.__module__, base.__name__,
            )  # fmt: skip
            return theirs
        return type(name, (ours, theirs), {"__module__": module})

    return find
