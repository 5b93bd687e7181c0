"""Off means off, registration is cheap and lazy, and every hook that this vLLM has is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest


def python(code, **environ):
    """Run `code` in a fresh interpreter; it prints one JSON value last."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | environ,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_registering_and_reading_settings_that_are_not_there_loads_nothing_else():
    loaded = python(
        """
        import json, sys
        from nwor_vllm.plugin import register
        register(); register()
        from nwor_vllm.plugin import configure
        assert configure.load({}, {}) is None
        print(json.dumps([m for m in ("torch", "vllm", "numpy", "nwor_vllm.policy") if m in sys.modules]))
        """
    )
    assert loaded == []


def test_a_module_that_is_imported_later_is_patched_once():
    assert python(
        """
        import json, sys
        from nwor_vllm.plugin import lazy
        seen = []
        lazy.when_imported("wave", lambda m: seen.append(m.__name__))
        lazy.when_imported("chunk_that_never_comes", lambda m: seen.append("no"))
        assert "wave" not in sys.modules
        import wave, importlib
        lazy.when_imported("wave", lambda m: seen.append("now"))
        assert type(wave.__spec__.loader).__name__ == "SourceFileLoader"
        print(json.dumps(seen))
        """
    ) == ["wave", "now"]


FINGERPRINT = """
    import json, sys
    from nwor_vllm.plugin import register
    if {register}:
        register()
    import vllm.config.vllm as config
    from vllm.v1.core.sched import async_scheduler, scheduler
    from vllm.v1.spec_decode import llm_base_proposer
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.engine import core
    found = []
    for owner in (scheduler.Scheduler, async_scheduler.AsyncScheduler, llm_base_proposer.SpecDecodeBaseProposer,
                  gpu_model_runner.GPUModelRunner, core.EngineCore, config.VllmConfig):
        for name, value in sorted(vars(owner).items()):
            if callable(value) and getattr(value, "__wrapped__", None) is not None:
                found.append(owner.__name__ + "." + name)
            if "nwor" in str(getattr(value, "__module__", "")) or "nwor" in getattr(
                getattr(value, "__code__", None), "co_filename", ""
            ):
                found.append("ours: " + owner.__name__ + "." + name)
    print(json.dumps([f for f in found if f.startswith("ours")]))
"""


@pytest.mark.vllm
def test_disabled_leaves_every_stock_object_alone():
    assert python(FINGERPRINT.format(register=True), NWOR_DISABLE="1") == []


@pytest.mark.vllm
def test_on_but_unset_touches_the_configuration_class_only():
    assert python(FINGERPRINT.format(register=True)) == [
        "ours: VllmConfig.__post_init__",
        "ours: VllmConfig._maybe_disable_dynamic_sd_for_data_parallel",
    ]


@pytest.mark.vllm
def test_every_hook_of_this_vllm_is_there_and_revert_puts_all_back():
    rows, same = python(
        """
        import json
        from nwor_vllm.plugin import compat, register
        import vllm.config.vllm as config
        stock = config.VllmConfig.__post_init__
        register()
        assert config.VllmConfig.__post_init__ is not stock
        once = config.VllmConfig.__post_init__
        register()
        assert config.VllmConfig.__post_init__ is once
        rows = compat.hooks()
        compat.revert()
        print(json.dumps([rows, config.VllmConfig.__post_init__ is stock]))
        """
    )
    assert same
    assert [row for row in rows if not row[2]] == []
    assert {row[0] for row in rows} >= {"register", "engine", "worker"}


@pytest.mark.vllm
def test_a_missing_hook_disables_its_feature_and_nothing_else():
    assert python(
        """
        import json
        import vllm.v1.spec_decode.llm_base_proposer as proposer
        from nwor_vllm.plugin import compat
        del proposer.SpecDecodeBaseProposer._get_slot_mapping
        missing = [name for _, name, available, why in compat.hooks() if not available]
        compat.apply("worker")
        import vllm.v1.worker.gpu_model_runner as runner
        ours = "nwor" in runner.GPUModelRunner.__init__.__code__.co_filename
        print(json.dumps([missing, ours]))
        """
    ) == [["no write on reject on the V1 runner"], True]
