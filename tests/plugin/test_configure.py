"""Settings become vLLM's own configuration; what contradicts itself is refused in one line, before an engine starts."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import types

import pytest

from nwor_vllm.errors import ConfigError, NworError

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


FIXED = {"policy": "fixed"}
REFUSED = [
    ({"policy": "godput"}, {}, {}, "unknown policy 'godput'; did you mean 'goodput'?"),
    ({"ladder": [0, 9]}, {}, {}, "nwor.ladder reaches 9 but num_speculative_tokens is 5"),
    ({"ladder": [3, 1]}, {}, {}, "expected ascending draft lengths"),
    ({"early_exit": {"threshold": 1.2}}, {}, {}, "early_exit.threshold is 1.2; expected a number in 0..1"),
    ({"early_exit": {"min_survival": -0.1}}, {}, {}, "early_exit.min_survival is -0.1; expected a number in 0..1"),
    ({"early_exit": {"thresh": 0.2}}, {}, {}, "unknown setting 'early_exit.thresh'; did you mean"),
    (FIXED | {"policy_params": {"k": 4}}, {}, {}, "policy_params.k is 4; the ladder has 0, 1, 2, 3, 5"),
    ({"cost_profile": "/nowhere.json"}, {}, {}, "/nowhere.json"),
    (
        FIXED,
        {"num_speculative_tokens_per_batch_size": [(1, 8, 3)]},
        {},
        "num_speculative_tokens_per_batch_size and nwor both choose the draft length",
    ),
    (FIXED, {"use_local_argmax_reduction": True}, {}, "speculative_config.use_local_argmax_reduction hides it"),
    (FIXED, {"parallel_drafting": True}, {}, "speculative_config.parallel_drafting drafts every position in one pass"),
    (
        {"early_exit": {"threshold": 0.5}},
        {},
        {"pipeline_parallel_size": 2},
        "pipeline_parallel_size is 2 and only its last rank sees the drafter",
    ),
]


@pytest.mark.parametrize(("nwor", "speculative", "settings", "words"), REFUSED, ids=[row[3][:40] for row in REFUSED])
def test_contradictions_are_refused_in_one_line(tiny, nwor, speculative, settings, words):
    with pytest.raises(NworError) as error:
        configured(tiny, nwor, speculative, **settings)
    said = str(error.value)
    assert words in said and "\n" not in said
    assert error.value.__cause__ is None


WRONG_KINDS = [
    ({"policy": 3}, "policy is 3; expected str"),
    ({"per_request": "yes"}, "per_request is 'yes'; expected bool"),
    ({"ladder": 4}, "ladder is 4; expected a list"),
    ({"ladder": [-1, 3]}, "ladder is [-1, 3]; expected draft lengths from 0 up"),
    ({"early_exit": 0.5}, "early_exit is 0.5; expected an object"),
    ({"early_exit": {"threshold": float("nan")}}, "early_exit.threshold is nan; expected a number"),
    ({"policy_params": [3]}, "policy_params is [3]; expected an object"),
    (FIXED | {"policy_params": {"k": -2}}, "policy_params.k is -2"),
    ({"policy_params": {"memory": -1}}, "policy_params.memory is -1.0; expected a positive number"),
    ({"polcy": "fixed"}, "unknown setting 'polcy'; did you mean 'policy'?"),
    ([1], "additional_config.nwor is [1]; expected an object of settings, true or false"),
]


@pytest.mark.parametrize(("nwor", "words"), WRONG_KINDS, ids=[row[1][:40] for row in WRONG_KINDS])
def test_unknown_names_wrong_types_and_impossible_numbers_are_refused_in_one_line(tiny, nwor, words):
    with pytest.raises(NworError) as error:
        configured(tiny, nwor)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_engine_after_refused_starts_is_as_good_as_any(tiny, speculation, token_prompts, engine_settings):
    from nwor_vllm.bench.backends import vllm as backend

    ask = {"temperature": 0.0, "max_tokens": 16}
    with backend.engine(tiny[0], None, **engine_settings) as llm:
        truth = backend.generate(llm, token_prompts, **ask)
    hook = sys.excepthook
    for nwor, speculative, settings, _ in REFUSED:
        with pytest.raises(NworError):
            configured(tiny, nwor, speculative, **settings)
    once = sys.excepthook
    with pytest.raises(NworError), backend.engine(tiny[0], speculation, additional_config={"nwor": {"policy": "x"}}):
        pass
    assert sys.excepthook is once  # refusals do not pile up
    sys.excepthook = hook
    with backend.engine(tiny[0], speculation, additional_config={"nwor": {}}, **engine_settings) as llm:
        assert backend.generate(llm, token_prompts, **ask) == truth
        assert backend.counters(llm)["accepted_tokens"] > 0


def live(config):
    """The part of a scheduler that a live change reads."""
    from nwor_vllm.config import load

    return types.SimpleNamespace(
        nwor_config=load(config.additional_config, {}), nwor_policy=None, vllm_config=config,
        nwor_make=lambda new: pytest.fail("a policy was made"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"early_exit": {"threshold": 0.1}}, {"early_exit": {"min_survival": 0.1}}, {"policy": "goodput"}],
    ids=str,
)
def test_a_live_change_into_a_contradiction_is_refused_like_a_start(tiny, experts, change):
    """Engines over several pipeline stages, or experts' ranks, do not run on every machine; their settings exist."""
    from nwor_vllm.plugin.control import answer

    lockstep = live(configured(tiny, FIXED, model=str(experts), data_parallel_size=2))
    assert "data_parallel_size is 2" in answer(lockstep, change)["error"]
    stages = live(configured(tiny, FIXED, pipeline_parallel_size=2))
    if "early_exit" in change:
        assert "pipeline_parallel_size is 2" in answer(stages, change)["error"]
    assert lockstep.nwor_config == stages.nwor_config == live(configured(tiny, FIXED)).nwor_config


def test_naming_our_scheduler_asks_for_the_plugin(tiny):
    """`--scheduler-cls`, without `additional_config`: the official form of the same."""
    from nwor_vllm.plugin import configure

    for given in configure.OURS:
        config = configured(tiny, None, scheduler_cls=given, async_scheduling=False)
        assert config.scheduler_config.scheduler_cls == configure.SCHEDULER
        assert config.additional_config == {"nwor": True}
        assert config.speculative_config.num_speculative_tokens_per_batch_size
        assert config.parallel_config.worker_extension_cls == configure.WORKER
    off = configured(tiny, {"enabled": False}, scheduler_cls=configure.SCHEDULER, async_scheduling=False)
    assert off.speculative_config.num_speculative_tokens_per_batch_size is None


def test_without_speculation_the_log_says_that_nothing_is_adapted(tiny, caplog):
    from vllm.engine.arg_utils import EngineArgs

    from nwor_vllm.plugin import configure

    configure._say_idle.cache_clear()
    with caplog.at_level("WARNING", "vllm.nwor"):
        for _ in range(2):
            config = EngineArgs(model=str(tiny[0]), skip_tokenizer_init=True, additional_config={"nwor": {}})
            assert config.create_engine_config().scheduler_config.scheduler_cls is None
    said = [record.getMessage() for record in caplog.records if record.name == "vllm.nwor"]
    assert said == ["nwor: there is no speculative_config, so there is nothing to adapt: vLLM runs as it is"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """The configuration of a mixture of experts, as far as vLLM's own configuration reads it."""
    folder = tmp_path_factory.mktemp("experts")
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
    kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    (folder / "config.json").write_text(json.dumps(kind | shape | heads | {"num_experts_per_tok": 2}))
    return folder


@pytest.mark.parametrize(
    "nwor", [{"policy": "goodput"}, {"policy": "off"}, FIXED | {"early_exit": {"threshold": 0.1}}], ids=str
)
def test_experts_whose_ranks_wait_for_each_other_draft_equally_long(tiny, experts, nwor):
    with pytest.raises(ConfigError, match=r"data_parallel_size is 2 .* equally long.*; use policy 'fixed' without k"):
        configured(tiny, nwor, model=str(experts), data_parallel_size=2)


def test_experts_may_draft_one_length(tiny, experts):
    config = configured(tiny, FIXED, model=str(experts), data_parallel_size=2)
    assert config.speculative_config.num_speculative_tokens_per_batch_size is None
    assert config.scheduler_config.scheduler_cls.startswith("nwor_vllm.")


def test_dense_ranks_are_engines_of_their_own(tiny):
    """vLLM drops the lengths under data parallelism, because ranks could wait for each other; dense ones do not."""
    config = configured(tiny, {"policy": "goodput"}, data_parallel_size=2)
    table = config.speculative_config.num_speculative_tokens_per_batch_size
    assert sorted(k for _, _, k in table) == [0, 1, 2, 3, 5]


class Extension:
    """What a user may have put behind vLLM's workers."""

    def theirs(self):
        return "theirs"


def scheduler_of_theirs():
    from vllm.v1.core.sched.scheduler import Scheduler

    return type("Theirs", (Scheduler,), {"__module__": __name__})


def test_classes_of_the_user_are_kept(tiny, monkeypatch, caplog):
    """By name or as they are: vLLM looks the pair up where it needs it, in this process or another."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from nwor_vllm.plugin.scheduler import Elastic
    from nwor_vllm.plugin.worker import ElasticWorker

    here = types.ModuleType("users_own")
    here.Theirs, here.Extension, here.Foreign = scheduler_of_theirs(), Extension, Extension
    here.Theirs.__module__ = here.__name__
    monkeypatch.setitem(sys.modules, here.__name__, here)
    for given in ("users_own.Theirs", here.Theirs):
        config = configured(tiny, FIXED, scheduler_cls=given, worker_extension_cls="users_own.Extension")
        scheduler = config.scheduler_config.get_scheduler_cls()
        assert scheduler.__mro__[1:3] == (Elastic, here.Theirs)
        assert pickle.loads(pickle.dumps(scheduler)) is scheduler
        worker = resolve_obj_by_qualname(config.parallel_config.worker_extension_cls)
        assert worker().theirs() == "theirs" and worker.__nwor__ is ElasticWorker.__nwor__
    with caplog.at_level("WARNING", "vllm.nwor"):
        config = configured(tiny, FIXED, scheduler_cls="users_own.Foreign")
        assert config.scheduler_config.get_scheduler_cls() is Extension
        local = type("Local", (here.Theirs,), {"__qualname__": "function.<locals>.Local"})
        assert configured(tiny, FIXED, scheduler_cls=local).scheduler_config.get_scheduler_cls() is local
    said = [record.getMessage() for record in caplog.records if record.name == "vllm.nwor"]
    assert "Extension is no subclass of vLLM's Scheduler: draft lengths and counters are off" in said[0]
    assert "move it there" in said[-1]


PROGRAMS = {
    "LLM": ["-c", "import sys, vllm; vllm.LLM(sys.argv[1], additional_config={'nwor': {'policy': 'godput'}})"],
    "server": ["-m", "vllm.entrypoints.openai.api_server", "--additional-config", '{"nwor": {"policy": "godput"}}'],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_last_word_of_a_refused_start_is_the_message(tiny, name):
    model = [str(tiny[0])] if name == "LLM" else ["--model", str(tiny[0])]
    done = subprocess.run([sys.executable, *PROGRAMS[name], *model], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "nwor: unknown policy 'godput'; did you mean 'goodput'?"
    assert "Traceback" not in done.stderr
