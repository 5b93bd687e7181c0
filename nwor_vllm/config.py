"""The plugin's settings: one frozen tree, built once at the edge, passed down.

Sources, strongest first: `additional_config["nwor"]`, then `NWOR_*` variables, then the defaults. `NWOR_DISABLE=1` wins
over everything. Unknown keys are errors: a typo must not become a wrong experiment.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nwor_vllm.errors import ConfigError, unknown_key

LARGEST = 1e12  # nothing here is meant to be as large, and what is infinite ends in NaN
# Read by scripts and the control endpoint, not settings of the tree.
OTHER_VARIABLES = frozenset({"NWOR_DISABLE", "NWOR_ENV", "NWOR_CONTROL_TOKEN", "NWOR_ZOO"})


def _unit(where: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{where} is {value}; expected a number in 0..1")


@dataclass(frozen=True)
class EarlyExit:
    """When a draft ends before the step's draft length."""

    threshold: float = 0.0  # stop a request whose draft's max probability is below this; 0 = off
    min_survival: float = 0.0  # stop a request whose product of max probabilities is below this; 0 = off
    policy_rule: bool = True  # let the policy end drafts whose next token does not pay for itself

    def __post_init__(self) -> None:
        _unit("early_exit.threshold", self.threshold)
        _unit("early_exit.min_survival", self.min_survival)


@dataclass(frozen=True)
class NworConfig:
    enabled: bool = True  # false leaves stock vLLM untouched
    policy: str = "goodput"  # which policy decides the draft length
    policy_params: Mapping[str, Any] = field(default_factory=dict)  # that policy's own parameters
    ladder: tuple[int, ...] = ()  # draft lengths a step may have; empty = 0,1,2,3,5,8 up to num_speculative_tokens
    per_request: bool = True  # let requests get less than the step's draft length
    early_exit: EarlyExit = field(default_factory=EarlyExit)
    no_write_on_reject: bool = True  # no draft-layer KV write for rows that are known dead
    cost_profile: str = ""  # a profile written by `nwor profile --cost`; empty = learn from scratch
    control_endpoint: bool = False  # serve POST /nwor (needs NWOR_CONTROL_TOKEN)

    def __post_init__(self) -> None:
        self.params()
        if any(k < 0 for k in self.ladder):
            raise ConfigError(f"ladder is {list(self.ladder)}; expected draft lengths from 0 up")
        if list(self.ladder) != sorted(set(self.ladder)):
            raise ConfigError(f"ladder is {list(self.ladder)}; expected ascending draft lengths, each once")

    def params(self) -> Any:
        """The policy's parameter dataclass."""
        from nwor_vllm.policy import POLICIES  # not above: vLLM without us reads this file too, and starts no later

        if self.policy not in POLICIES:
            raise unknown_key("policy", self.policy, POLICIES)
        return from_mapping(POLICIES[self.policy].params, self.policy_params, "policy_params")


def from_mapping(cls: type[Any], data: Mapping[str, Any], where: str = "") -> Any:
    """Build dataclass `cls` from plain data: nested, type-checked, unknown keys refused with the nearest name."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'nwor'} is {data!r}; expected an object")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    kwargs: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise unknown_key("setting", path, (f"{where}.{n}" if where else n for n in names))
        kwargs[key] = _convert(hints[key], value, path)
    return cls(**kwargs)


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_mapping(kind, value, path)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not -LARGEST <= value <= LARGEST:  # NaN and infinity too
            raise ConfigError(f"{path} is {value}; expected a number within {LARGEST:.0e}")
        if kind is float:
            return float(value)
    if origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    expected = {Mapping: "an object", tuple: "a list"}.get(typing.get_origin(kind), getattr(kind, "__name__", kind))
    raise ConfigError(f"{path} is {value!r}; expected {expected}")


def disabled(environ: Mapping[str, str]) -> bool:
    return environ.get("NWOR_DISABLE", "") not in ("", "0")


def load(additional_config: Any, environ: Mapping[str, str]) -> NworConfig | None:
    """The settings of an engine, or None while the plugin is off."""
    if disabled(environ):
        return None
    given = additional_config.get("nwor") if isinstance(additional_config, Mapping) else None
    if given is None or given is False:
        return None
    if given is True:
        given = {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"additional_config.nwor is {given!r}; expected an object of settings, true or false")
    merged = _from_environ(environ)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    config: NworConfig = from_mapping(NworConfig, merged)
    return config if config.enabled else None


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """`NWOR_POLICY=fixed`, `NWOR_EARLY_EXIT__THRESHOLD=0.5`: values are JSON where they parse, else text."""
    tree: dict[str, Any] = {}
    top = {f.name for f in dataclasses.fields(NworConfig)}
    for name, text in environ.items():
        if not name.startswith("NWOR_") or name in OTHER_VARIABLES:
            continue
        path = name.removeprefix("NWOR_").lower().split("__")
        if path[0] not in top:
            raise unknown_key("variable", name, {f"NWOR_{n.upper()}" for n in top} | OTHER_VARIABLES)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        try:
            node[path[-1]] = json.loads(text)
        except json.JSONDecodeError:
            node[path[-1]] = text
    return tree
