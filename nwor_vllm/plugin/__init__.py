"""The glue to stock vLLM, in the order things happen.

register        vLLM calls it in every process; it hooks the engine's configuration and nothing else
configure       reads additional_config["nwor"], checks it, names our scheduler and worker extension in its place
combine         what becomes of a scheduler or worker extension of the user's own
scheduler       gives each step its draft length, feeds what was accepted to the policy
worker          puts our runner and drafter classes in front of the stock ones
drafter_v1, v2  stop drafting early, write no KV for dead rows
catch_up, _v2   steps that draft nothing run nothing; the drafter's K/V follows later
graph_memory    what the CUDA graphs of all draft lengths take
messages        what scheduler and workers tell each other
counters, metrics, control   what can be read and switched while it runs
compat          the private vLLM names all this needs, and what is lost where one is missing
"""

from __future__ import annotations

import os


def register() -> None:
    """vLLM calls this in every process, more than once. It loads neither torch nor vllm."""
    from nwor_vllm.config import disabled
    from nwor_vllm.plugin import compat

    if not disabled(os.environ):
        compat.apply_when_imported("register")
