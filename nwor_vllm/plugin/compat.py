"""Every private vLLM name that is looked up from outside its class, and what is lost where one is missing.

To add an adapter: write `adapt(stock) -> replacement` in its own module, and a `Feature` below that names the stock
attribute, the stage at which it is needed and what the replacement relies on. `apply(stage)` does the rest: a feature
whose needs are not met is left out with one log line, nothing is patched twice, and `revert` puts all back.
Requirements are probed, never read off a version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nwor_vllm.plugin import lazy

log = logging.getLogger("vllm.nwor")


@dataclass(frozen=True)
class Need:
    target: str  # module:attribute.path
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patch:
    target: str
    adapter: str  # module:function, stock -> replacement; imported when it is applied


@dataclass(frozen=True)
class Feature:
    name: str
    stage: str  # "register": every process; "api server"; "engine": where the scheduler lives; "worker"; "worker_v2"
    needs: tuple[Need, ...] = ()
    patch: Patch | None = None


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_BOUNDARIES = "vllm.v1.core.kv_cache_coordinator:replay_boundaries"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_SEVERAL_SERVERS = "prometheus_client.multiprocess:MultiProcessCollector.collect"
CPU_KERNELS = "4096"  # oneDNN's, kept at a time
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_V2_DRAFTING = "vllm.v1.worker.gpu.spec_decode"
_V2_DEPENDENT = f"{_V2_DRAFTING}.target_dependent_ar.speculator:TargetDependentARSpeculator"
_V2_STANDALONE = f"{_V2_DRAFTING}.standalone_ar.speculator:StandaloneARSpeculator"
_V2_BATCH = "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor"
_V2_SLOTS = "vllm.v1.worker.gpu.attn_utils:build_slot_mappings_by_layer"
_V2_PAD = f"{_V2_DRAFTING}.multi_module_mtp.speculator:pad_trailing_draft_slots"

FEATURES: tuple[Feature, ...] = (
    Feature(
        "settings from additional_config",
        "register",
        (Need("vllm.config.vllm:VllmConfig.__post_init__"),),
        Patch("vllm.config.vllm:VllmConfig.__post_init__", "nwor_vllm.plugin.configure:adapt"),
    ),
    Feature(
        "draft lengths of data-parallel ranks",
        "register",
        (Need("vllm.config.vllm:VllmConfig._maybe_disable_dynamic_sd_for_data_parallel"),),
        Patch(
            "vllm.config.vllm:VllmConfig._maybe_disable_dynamic_sd_for_data_parallel",
            "nwor_vllm.plugin.configure:adapt_data_parallel",
        ),
    ),
    Feature(
        "draft length per step",
        "engine",
        (Need("vllm.v1.core.sched.output:SchedulerOutput.num_spec_tokens_to_schedule"), Need(f"{_SCHEDULER}.schedule")),
    ),
    Feature("acceptance feed", "engine", (Need(f"{_SCHEDULER}.make_spec_decoding_stats", ("request_id",)),)),
    Feature("draft length per request", "engine", (Need(f"{_SCHEDULER}.update_draft_token_ids"),)),
    Feature(
        "replay boundaries of a prompt, worked out once",
        "engine",
        (Need(_BOUNDARIES, ("num_prompt_tokens", "scheduler_block_size", "use_eagle")),),
        Patch(_BOUNDARIES, "nwor_vllm.plugin.scheduler:adapt_boundaries"),
    ),
    Feature("run-time control", "engine", (Need("vllm.v1.engine.core_client:EngineCoreClient"),)),
    Feature(
        "metrics of several API servers",
        "api server",
        (Need(_SEVERAL_SERVERS),),
        Patch(_SEVERAL_SERVERS, "nwor_vllm.plugin.metrics:adapt"),
    ),
    Feature(
        "sampling above temperature 0 on CPU",
        "worker",
        (),
        Patch("vllm.utils.cpu_triton_utils:_expand_kernel_impl", "nwor_vllm.plugin.expand:adapt"),
    ),
    Feature(
        "early exit on the V1 runner",
        "worker",
        (
            Need(f"{_RUNNER}.propose_draft_token_ids", ("scheduler_output",)),
            Need(f"{_PROPOSER}.propose", ("num_speculative_tokens", "common_attn_metadata")),
            Need(f"{_PROPOSER}._sample_draft_tokens", ("hidden_states", "sampling_metadata")),
            Need(f"{_PROPOSER}._sample_from_logits", ("logits", "sampling_metadata")),
        ),
        Patch(f"{_RUNNER}.__init__", "nwor_vllm.plugin.runner_v1:adapt"),
    ),
    Feature(
        "trimming under asynchronous scheduling on the V1 runner",
        "worker",
        (Need(f"{_RUNNER}._update_states", ("scheduler_output",)), Need(f"{_RUNNER}.execute_model")),
    ),
    Feature(
        "steps without drafts on the V1 runner",
        "worker",
        (
            Need(f"{_RUNNER}._calc_spec_decode_metadata", ("num_draft_tokens", "cu_num_scheduled_tokens")),
            Need(f"{_RUNNER}._sample", ("logits", "spec_decode_metadata")),
            Need("vllm.v1.spec_decode.metadata:SpecDecodeMetadata", ("num_draft_tokens",)),
            Need(f"{_RUNNER}.take_draft_token_ids"),
        ),
    ),
    Feature(
        "no write on reject on the V1 runner",
        "worker",
        (
            Need(f"{_PROPOSER}._get_slot_mapping", ("num_tokens", "slot_mapping")),
            Need(f"{_PROPOSER}._update_positions_dependent_metadata"),
        ),
    ),
    Feature(
        "draft length on the V2 runner",
        "worker_v2",
        (
            Need(f"{_V2_RUNNER}.execute_model", ("scheduler_output",)),
            Need(f"{_V2_RUNNER}.sample_tokens", ("grammar_output",)),
            Need(f"{_V2_RUNNER}.take_draft_token_ids"),
            Need(f"{_V2_DEPENDENT}.propose", ("num_speculative_tokens", "dummy_run")),
            Need(f"{_V2_STANDALONE}.propose", ("num_speculative_tokens", "dummy_run")),
        ),
        Patch(f"{_V2_RUNNER}.__init__", "nwor_vllm.plugin.runner_v2:adapt"),
    ),
    Feature(
        "early exit on the V2 runner",
        "worker_v2",
        (
            Need(f"{_V2_DEPENDENT}._maybe_predict_acceptance", ("logits", "idx_mapping", "draft_step")),
            Need(f"{_V2_DEPENDENT}._generate_draft"),
            Need(f"{_V2_DEPENDENT}._multi_step_decode"),
            Need(f"{_V2_DEPENDENT}._fused_multi_step_decode"),
            Need(f"{_V2_STANDALONE}._multi_step_decode"),
            Need(f"{_V2_STANDALONE}._run_model"),
        ),
    ),
    Feature(
        "no draft forward at K = 0 on the V2 runner",
        "worker_v2",
        (
            Need(f"{_V2_DEPENDENT}._build_attn_metadata", ("query_start_loc_np", "step", "slot_mappings")),
            Need(f"{_V2_DEPENDENT}._run_model", ("num_tokens", "attn_metadata", "slot_mappings")),
            Need(_V2_BATCH, ("cg_mode", "num_tokens", "num_reqs")),
            Need(_V2_SLOTS, ("slot_mappings", "kv_cache_config")),
        ),
    ),
    Feature(
        "no write on reject on the V2 runner",
        "worker_v2",
        (Need(_V2_PAD, ("slot_mappings", "query_start_loc", "last_token_indices", "num_reqs")),),
    ),
)

_applied: dict[str, tuple[Any, str, Any]] = {}  # target -> owner, attribute, stock
_missing: dict[str, str] = {}  # what was logged


def resolve(target: str) -> tuple[Any, str, Any]:
    """Owner, attribute name and value of `module:path`. Raises ImportError or AttributeError."""
    module, path = target.split(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


def why_not(feature: Feature) -> str:
    """What the feature misses in this vLLM; empty when it can work. Imports what it probes."""
    for need in feature.needs:
        try:
            value = resolve(need.target)[2]
        except (ImportError, AttributeError) as error:
            return f"{need.target} is missing ({error})"
        if need.parameters:
            absent = set(need.parameters) - set(inspect.signature(value).parameters)
            if absent:
                return f"{need.target} has no parameter {', '.join(sorted(absent))}"
    return ""


def hooks() -> list[tuple[str, str, bool, str]]:
    """(stage, feature, available, why not), for `nwor doctor`. Imports vLLM."""
    rows = []
    for feature in FEATURES:
        why = why_not(feature)
        rows.append((feature.stage, feature.name, not why, why))
    return rows


def has(name: str) -> bool:
    return not why_not(next(f for f in FEATURES if f.name == name))


def apply(stage: str) -> None:
    """Patch what belongs to `stage`. Again is harmless."""
    for feature in FEATURES:
        if feature.stage != stage or feature.name in _missing:
            continue
        why = why_not(feature)
        if why:
            _missing[feature.name] = why
            log.warning("nwor: %s is disabled: %s", feature.name, why)
        elif feature.patch is not None:
            _patch(feature.patch)


def apply_when_imported(stage: str) -> None:
    """The same without importing anything: each patch waits for its module."""
    for feature in FEATURES:
        if feature.stage == stage and feature.patch is not None:
            patch = feature.patch
            lazy.when_imported(patch.target.split(":")[0], functools.partial(_patch_loaded, patch))


def _patch_loaded(patch: Patch, module: ModuleType) -> None:
    _patch(patch)


def _patch(patch: Patch) -> None:
    if patch.target in _applied:
        return
    try:
        owner, name, stock = resolve(patch.target)
    except (ImportError, AttributeError):
        return  # nothing to put right in this build
    adapter: Callable[[Any], Any] = resolve(patch.adapter)[2]
    replacement = adapter(stock)
    if replacement is not stock:
        _applied[patch.target] = (owner, name, stock)
        setattr(owner, name, replacement)


def revert() -> None:
    """Every stock object back in its place."""
    for owner, name, stock in reversed(_applied.values()):
        setattr(owner, name, stock)
    _applied.clear()
    _missing.clear()
    for feature in FEATURES:
        if feature.patch is not None:
            lazy.forget(feature.patch.target.split(":")[0])


def fix_cpu_expand() -> bool:
    """Put right the CPU build's expansion of sampling parameters; true where it had to be."""
    patch = next(f.patch for f in FEATURES if f.name == "sampling above temperature 0 on CPU")
    assert patch is not None
    if patch.target in _applied:
        return False
    load_operators()
    try:
        dispatcher: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    except ImportError:
        return False
    _patch(patch)
    name = "vllm.v1.sample.rejection_sampler.expand_kernel"
    if patch.target in _applied and name in dispatcher._registry:  # registered before us: replace it where it is used
        dispatcher.register_kernels({name: resolve(patch.target)[2]})
    return patch.target in _applied


def keep_cpu_kernels() -> None:
    """oneDNN compiles its kernels for each number of rows, which takes some milliseconds, and keeps the latest 1024:
    few, where every step verifies another number of tokens. It reads this when it makes the first."""
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CPU_KERNELS)


def load_operators() -> None:
    """vLLM's compiled operators register when they are imported; builds name that module differently."""
    with contextlib.suppress(ImportError):
        importlib.import_module("vllm._C")


def attach(output: Any, report: Any) -> Any:
    """Let `report` travel with what the runner returns for a step."""
    carrier = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", output)
    if getattr(carrier, "req_ids", None):  # the empty output is one shared object
        carrier.nwor = report
    return output


def allow_async_on_cpu() -> None:
    """vLLM's CPU platform turns asynchronous scheduling off, as not required; checks need it as on a GPU."""
    platform: Any = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    stock = platform.check_and_update_config
    if getattr(stock, "nwor", False):
        return

    def check_and_update_config(vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    check_and_update_config.nwor = True  # type: ignore[attr-defined]
    platform.check_and_update_config = staticmethod(check_and_update_config)


def apply_to_v2_runner() -> None:
    """The V2 stage, once its runner is imported: an engine on the V1 runner never loads it."""
    lazy.when_imported(_V2_RUNNER.split(":")[0], lambda module: apply("worker_v2"))


def v2_speculators() -> tuple[type[Any], type[Any]]:
    """The V2 runner's autoregressive speculators: those that read the target's states, and the draft model."""
    return resolve(_V2_DEPENDENT)[2], resolve(_V2_STANDALONE)[2]


def v2_pad_rejected() -> Callable[..., None]:
    """Marks the draft prefill's rows after each request's last valid token: no K/V is written for them."""
    pad: Callable[..., None] = resolve(_V2_PAD)[2]
    return pad


def v2_eager_batch(tokens: int, requests: int) -> Any:
    """A batch that runs without CUDA graphs, as V2's attention metadata wants it described."""
    mode = importlib.import_module("vllm.config.compilation").CUDAGraphMode.NONE
    return resolve(_V2_BATCH)[2](cg_mode=mode, num_tokens=tokens, num_reqs=requests)


def v2_slots_by_layer(slots: Any, kv_cache_config: Any) -> Any:
    return resolve(_V2_SLOTS)[2](slots, kv_cache_config)
