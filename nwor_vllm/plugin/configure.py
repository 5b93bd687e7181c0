"""From settings to vLLM's own configuration: the draft-length ladder, our scheduler, our worker extension."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from nwor_vllm.config import NworConfig, load
from nwor_vllm.errors import ConfigError, NworError
from nwor_vllm.plugin.combine import name_of
from nwor_vllm.plugin.compat import log

ELASTIC = "nwor_vllm.plugin.scheduler.Elastic"  # the mixin of the two that follow
SCHEDULER = "nwor_vllm.plugin.scheduler.ElasticScheduler"
ASYNC_SCHEDULER = "nwor_vllm.plugin.scheduler.ElasticAsyncScheduler"
OURS = (SCHEDULER, ASYNC_SCHEDULER)
WORKER = "nwor_vllm.plugin.worker.ElasticWorker"


def adapt(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """Around VllmConfig.__post_init__, which also runs for copies that vLLM makes of a configuration."""

    @functools.wraps(stock)
    def post_init(self: Any) -> None:
        if _class_name(self.scheduler_config.scheduler_cls) in OURS and isinstance(self.additional_config, dict):
            self.additional_config.setdefault("nwor", True)  # to name our scheduler is to ask for us
        try:
            config = load(self.additional_config, os.environ)
            ladder = check(config, self) if config is not None and self.speculative_config is not None else ()
        except NworError:
            _end_in_one_line()
            raise
        if not ladder:
            if config is not None:
                _say_idle()
            stock(self)
            return
        if not in_lockstep(self):
            self.speculative_config.num_speculative_tokens_per_batch_size = table_of(ladder)
        stock(self)
        install(self)

    return post_init


def adapt_data_parallel(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """Around VllmConfig's removal of the draft-length table under data parallelism, which is for lockstep's sake."""

    @functools.wraps(stock)
    def disable(self: Any) -> None:
        if in_lockstep(self) or load(self.additional_config, os.environ) is None:
            stock(self)

    return disable


def in_lockstep(vllm_config: Any) -> bool:
    """Whether data-parallel ranks wait for each other in every forward. A dense model's are engines of their own."""
    return vllm_config.parallel_config.data_parallel_size > 1 and bool(vllm_config.model_config.is_moe)


def _class_name(given: Any) -> str | None:
    return f"{given.__module__}.{given.__qualname__}" if isinstance(given, type) else given


def _end_in_one_line() -> None:
    """The refused start ends the program, unless somebody catches it: its last word is the message, no call stack."""
    stock = sys.excepthook
    if stock.__module__ == __name__:
        return  # another start was refused before, and caught

    def excepthook(kind: Any, error: BaseException, trace: Any) -> None:
        if isinstance(error, NworError):
            print(f"nwor: {error}", file=sys.stderr)
        else:
            stock(kind, error, trace)

    sys.excepthook = excepthook


@functools.cache
def _say_idle() -> None:
    log.warning("nwor: there is no speculative_config, so there is nothing to adapt: vLLM runs as it is")


def ladder_of(config: NworConfig, k_max: int) -> tuple[int, ...]:
    from nwor_vllm.policy import default_ladder

    ladder = config.ladder or default_ladder(k_max)
    if ladder[-1] > k_max:
        raise ConfigError(
            f"nwor.ladder reaches {ladder[-1]} but num_speculative_tokens is {k_max}; "
            "raise num_speculative_tokens or shorten the ladder"
        )
    return ladder


def check(config: NworConfig, vllm_config: Any) -> tuple[int, ...]:
    """Refuse what cannot work, in one line that names both sides."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    k_max = speculative.num_speculative_tokens
    ladder = ladder_of(config, k_max)
    thresholds = config.early_exit.threshold or config.early_exit.min_survival
    if getattr(speculative, "use_local_argmax_reduction", False):
        raise ConfigError(
            "nwor needs the drafter's distribution and speculative_config.use_local_argmax_reduction hides it; "
            "set it to false"
        )
    if getattr(speculative, "parallel_drafting", False):
        raise ConfigError(
            "speculative_config.parallel_drafting drafts every position in one pass, so nwor has nothing to stop; "
            "use one of the two"
        )
    given = getattr(speculative, "num_speculative_tokens_per_batch_size", None)
    if given and [tuple(row) for row in given] != table_of(ladder):
        raise ConfigError(
            "speculative_config.num_speculative_tokens_per_batch_size and nwor both choose the draft length; drop one"
        )
    if in_lockstep(vllm_config) and (thresholds or config.policy != "fixed" or config.params().k not in (-1, k_max)):
        raise ConfigError(
            f"data_parallel_size is {parallel.data_parallel_size} and the ranks of a mixture of experts must draft "
            f"equally long, which policy {config.policy!r} cannot promise; use policy 'fixed' without k or thresholds"
        )
    if parallel.pipeline_parallel_size > 1 and thresholds:
        raise ConfigError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size} and only its last rank sees the drafter, so "
            "early_exit cannot trim what the others verify; set early_exit.threshold and min_survival to 0"
        )
    from nwor_vllm.policy import make_policy  # where an engine asks for us, and no earlier

    make_policy(config.policy, config.params(), ladder, config.cost_profile)  # what it refuses is refused here
    return ladder


def table_of(ladder: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """vLLM captures CUDA graphs for the draft lengths of its batch-size table: one made-up entry for each of ours.

    The scheduler replaces the table. On the V1 runner vLLM answers a table with PIECEWISE graphs.
    """
    return [(size, size, k) for size, k in enumerate(reversed(ladder), start=1)]


def install(vllm_config: Any) -> None:
    """Our classes in vLLM's places; in front of the user's own where there are some."""
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    stock = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
    given = scheduler.scheduler_cls
    ours = given is None or _class_name(given) in OURS
    scheduler.scheduler_cls = stock if ours else name_of(ELASTIC, given)
    parallel.worker_extension_cls = name_of(WORKER, parallel.worker_extension_cls or WORKER)
