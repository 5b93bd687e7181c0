"""Read and switch a live engine between batches: `apply(llm, {"policy": "fixed", "policy_params": {"k": 3}})`.

The scheduler lives in the engine core, which may be another process. vLLM's clients call methods of the core by name
(`call_utility`); `serve_control` gives the core one such method. Changes are settings as in `additional_config["nwor"]`
and take effect with the next step that is planned.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from nwor_vllm.config import NworConfig, from_mapping
from nwor_vllm.errors import ConfigError, MissingError, unknown_key
from nwor_vllm.plugin.configure import check, ladder_of
from nwor_vllm.policy import Round, Step

METHOD = "nwor_control"
LIVE = frozenset({"policy", "policy_params", "early_exit", "per_request"})  # the rest is fixed at engine start
ACTIONS = frozenset({"reset", "restore"})


def apply(llm: Any, change: Mapping[str, Any]) -> dict[str, Any]:
    """Change settings of a running `LLM`; returns its snapshot. A `policy` starts afresh, with its own parameters."""
    return _call(llm, dict(change))


def snapshot(llm: Any) -> dict[str, Any]:
    """Settings, counters, policy state and the numbers of the latest requests, as plain JSON types."""
    return _call(llm, {})


def workers(llm: Any) -> list[dict[str, Any]]:
    """Each worker's own counts, by rank."""
    found: list[dict[str, Any]] = llm.collective_rpc("__nwor__")
    return found


def _call(llm: Any, change: dict[str, Any]) -> dict[str, Any]:
    client = getattr(getattr(llm, "llm_engine", llm), "engine_core", None)
    core = getattr(client, "engine_core", None)
    if core is not None and not hasattr(core, METHOD):
        raise MissingError('this engine runs without nwor; start it with additional_config={"nwor": {...}}')
    result: Any = core.nwor_control(change) if core is not None else client.call_utility(METHOD, change)  # type: ignore[union-attr]
    return _raised(result)


async def call_async(engine: Any, change: Mapping[str, Any]) -> dict[str, Any]:
    """The same for an `AsyncLLM`."""
    return _raised(await engine.engine_core.call_utility_async(METHOD, dict(change)))


def _raised(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        raise ConfigError(result["error"])
    return result


def serve_control() -> None:
    """Called where the scheduler is built, in the engine core's process."""
    core: Any = importlib.import_module("vllm.v1.engine.core").EngineCore

    def nwor_control(self: Any, change: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = self.scheduler.nwor_control(change)
        return result

    if not hasattr(core, METHOD):
        core.nwor_control = nwor_control


def answer(scheduler: Any, change: dict[str, Any]) -> dict[str, Any]:
    """What the core's method does: all of the change or, with an error, none. Errors travel as text, being far away."""
    try:
        config, policy = changed(scheduler, {k: v for k, v in change.items() if k not in ACTIONS})
        if "restore" in change:
            policy = restored(scheduler, config, change["restore"])
        reset = change.get("reset", False)
        if not isinstance(reset, bool):
            raise ConfigError(f"reset is {reset!r}; expected true or false")
    except ConfigError as error:
        return {"error": str(error)}
    scheduler.nwor_config, scheduler.nwor_policy = config, policy
    if reset:
        counters = scheduler.nwor_counters
        scheduler.nwor_counters = type(counters)(counters.draft_row_bytes, counters.target_row_bytes)
        scheduler.nwor_requests = type(scheduler.nwor_requests)()
    return {
        "settings": dataclasses.asdict(config) | {"ladder": list(config.ladder)},
        "counters": scheduler.nwor_counters.snapshot(),
        "policy": policy.snapshot(),
        "policy_metrics": policy.metrics(),
        "requests": scheduler.nwor_requests.snapshot(),
    }


def changed(scheduler: Any, settings: dict[str, Any]) -> tuple[NworConfig, Any]:
    """The settings and policy that `settings` lead to."""
    old: NworConfig = scheduler.nwor_config
    for key in settings:
        if key not in LIVE:
            raise unknown_key("live setting", key, LIVE | ACTIONS)
    plain = {f.name: getattr(old, f.name) for f in dataclasses.fields(old)}
    plain["ladder"], plain["early_exit"] = list(old.ladder), dataclasses.asdict(old.early_exit)
    if "policy" in settings:
        plain["policy_params"] = {}
    for key, value in settings.items():
        plain[key] = {**plain[key], **value} if key == "early_exit" and isinstance(value, Mapping) else value
    new: NworConfig = from_mapping(NworConfig, plain)
    check(new, scheduler.vllm_config)
    if "policy" not in settings and "policy_params" not in settings:
        return new, scheduler.nwor_policy
    return new, scheduler.nwor_make(new)


def restored(scheduler: Any, config: NworConfig, state: Any) -> Any:
    """A policy that goes on from a snapshot, tried out first: another policy's, or another ladder's, breaks later."""
    trial, policy = scheduler.nwor_make(config), scheduler.nwor_make(config)
    try:
        trial.restore(state)
        k = trial.plan(["trial"]).k
        trial.observe(Step([Round("trial", k, k, 0)], k, k, 1.0, requests=1, verified_tokens=1 + k))
        trial.snapshot()
        policy.restore(state)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    else:
        ladder = ladder_of(config, scheduler.nwor_k_max)
        if k in ladder:
            for request_id in [*policy.slots.row, *policy.slots.told] if hasattr(policy, "slots") else ():
                if request_id not in scheduler.requests:  # it ended after the snapshot: nobody else would forget it
                    policy.forget(request_id)
            scheduler.nwor_begin(policy)
            return policy
        why = f"it drafts {k}, and the ladder has {', '.join(map(str, ladder))}"
    raise ConfigError(f"restore holds no snapshot of policy {config.policy!r} as it is set here ({why})")
