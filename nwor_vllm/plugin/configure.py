"""From settings to vLLM's own configuration: the draft-length ladder, our scheduler, our worker extension."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from nwor_vllm.config import NworConfig, load
from nwor_vllm.errors import ConfigError
from nwor_vllm.policy import default_ladder

SCHEDULER = "nwor_vllm.plugin.scheduler.ElasticScheduler"
ASYNC_SCHEDULER = "nwor_vllm.plugin.scheduler.ElasticAsyncScheduler"
WORKER = "nwor_vllm.plugin.worker.ElasticWorker"


def adapt(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """Around VllmConfig.__post_init__, which also runs for copies that vLLM makes of a configuration."""

    @functools.wraps(stock)
    def post_init(self: Any) -> None:
        config = load(self.additional_config, os.environ)
        if config is None or self.speculative_config is None:
            stock(self)
            return
        ladder = check(config, self)
        if self.parallel_config.data_parallel_size == 1:
            self.speculative_config.num_speculative_tokens_per_batch_size = table_of(ladder)
        stock(self)
        install(self)

    return post_init


def ladder_of(config: NworConfig, k_max: int) -> tuple[int, ...]:
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
    ladder = ladder_of(config, speculative.num_speculative_tokens)
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
    if parallel.data_parallel_size > 1 and (config.policy not in ("fixed", "off") or thresholds):
        raise ConfigError(
            f"data_parallel_size is {parallel.data_parallel_size} and its ranks must draft equally long, which policy "
            f"{config.policy!r} with early_exit.threshold {config.early_exit.threshold} cannot promise; "
            "use policy 'fixed' or 'off' without thresholds"
        )
    if parallel.pipeline_parallel_size > 1 and thresholds:
        raise ConfigError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size} and only its last rank sees the drafter, so "
            "early_exit cannot trim what the others verify; set early_exit.threshold and min_survival to 0"
        )
    return ladder


def table_of(ladder: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """vLLM captures CUDA graphs for the draft lengths of its batch-size table: one made-up entry for each of ours.

    The scheduler replaces the table. On the V1 runner vLLM answers a table with PIECEWISE graphs.
    """
    return [(size, size, k) for size, k in enumerate(reversed(ladder), start=1)]


def install(vllm_config: Any) -> None:
    from nwor_vllm.plugin.compat import log

    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
    elif scheduler.scheduler_cls not in (SCHEDULER, ASYNC_SCHEDULER):
        log.warning(
            "nwor: scheduler_cls is %s: the policy and run-time control are disabled unless it derives from %s",
            scheduler.scheduler_cls,
            SCHEDULER,
        )
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = WORKER
    elif parallel.worker_extension_cls != WORKER:
        log.warning(
            "nwor: worker_extension_cls is %s: early exit and draft counters are disabled unless it derives from %s",
            parallel.worker_extension_cls,
            WORKER,
        )
