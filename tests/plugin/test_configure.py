"""Settings become vLLM's own configuration; what contradicts itself is refused in one line, before an engine starts."""

from __future__ import annotations

import pytest

from nwor_vllm.errors import ConfigError

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def registered():
    """As vLLM does it, once a process: taking it back would leave the engines of later tests without the plugin."""
    from nwor_vllm.plugin import register

    register()


def configured(tiny, nwor, speculative=None, **settings):
    from vllm.engine.arg_utils import EngineArgs

    spec = {"method": "draft_model", "model": str(tiny[1]), "num_speculative_tokens": 5} | (speculative or {})
    given = {"model": str(tiny[0]), "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
    extra = {} if nwor is None else {"nwor": nwor}
    return EngineArgs(**(given | settings), speculative_config=spec, additional_config=extra).create_engine_config()


def test_absent_settings_change_nothing(tiny):
    config = configured(tiny, None)
    assert config.scheduler_config.scheduler_cls is None
    assert not config.parallel_config.worker_extension_cls
    assert config.speculative_config.num_speculative_tokens_per_batch_size is None
    off = configured(tiny, {"enabled": False})
    assert off.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(("asynchronous", "name"), [(True, "ElasticAsyncScheduler"), (False, "ElasticScheduler")])
def test_scheduler_ladder_and_worker_are_declared(tiny, asynchronous, name):
    from nwor_vllm.plugin import compat

    if asynchronous:
        compat.allow_async_on_cpu()
    config = configured(tiny, {"policy": "fixed"}, async_scheduling=asynchronous)
    assert config.scheduler_config.scheduler_cls == f"nwor_vllm.plugin.scheduler.{name}"
    assert config.scheduler_config.get_scheduler_cls().__name__ == name
    table = config.speculative_config.num_speculative_tokens_per_batch_size
    assert sorted(k for _, _, k in table) == [0, 1, 2, 3, 5]
    assert config.parallel_config.worker_extension_cls.startswith("nwor_vllm.")


REFUSED = [
    ({"policy": "godput"}, {}, {}, "unknown policy 'godput'; did you mean 'goodput'?"),
    ({"ladder": [0, 9]}, {}, {}, "nwor.ladder reaches 9 but num_speculative_tokens is 5"),
    ({"ladder": [3, 1]}, {}, {}, "expected ascending draft lengths"),
    ({"early_exit": {"threshold": 1.2}}, {}, {}, "early_exit.threshold is 1.2; expected a number in 0..1"),
    (
        {"early_exit": {"thresh": 0.2}},
        {},
        {},
        "unknown setting 'early_exit.thresh'; did you mean",
    ),
    (
        {"policy": "fixed"},
        {"num_speculative_tokens_per_batch_size": [(1, 8, 3)]},
        {},
        "num_speculative_tokens_per_batch_size and nwor both choose the draft length",
    ),
    ({"policy": "goodput"}, {}, {"data_parallel_size": 2}, "data_parallel_size is 2 and its ranks must draft equally"),
    (
        {"early_exit": {"threshold": 0.5}},
        {},
        {"pipeline_parallel_size": 2},
        "pipeline_parallel_size is 2 and only its last rank sees the drafter",
    ),
]


@pytest.mark.parametrize(("nwor", "speculative", "settings", "words"), REFUSED, ids=[row[3][:40] for row in REFUSED])
def test_contradictions_are_refused_in_one_line(tiny, nwor, speculative, settings, words):
    with pytest.raises(Exception) as error:
        configured(tiny, nwor, speculative, **settings)
    said = str(error.value)
    assert words in said


@pytest.mark.parametrize("flag", ["use_local_argmax_reduction", "parallel_drafting"])
def test_drafters_without_a_distribution_are_refused(tiny, flag):
    """vLLM has conditions of its own for these flags, so they are set on a configuration that it accepted."""
    from nwor_vllm.config import NworConfig
    from nwor_vllm.plugin.configure import check

    config = configured(tiny, None)
    setattr(config.speculative_config, flag, True)
    with pytest.raises(ConfigError, match=flag):
        check(NworConfig(), config)
