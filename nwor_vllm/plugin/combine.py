"""A scheduler or worker extension of the user's own keeps its work: ours is put in front of it.

vLLM hands classes to its processes by name, so the pair has a name too, `our.module.OurClass+their:module:Class`. The
module of our class makes the pair when that name is looked up in it.
"""

from __future__ import annotations

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


def theirs_in(module: str, name: str) -> Any:
    """The user's class of such a name, for the `__getattr__` of the module of ours."""
    _, plus, path = name.partition("+")
    if not plus:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return compat.resolve(":".join(path.replace(":", ".").rsplit(".", 1)))[2]
