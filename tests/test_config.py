"""The settings tree: sources, their order, and every way to get them wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nwor_vllm.config import NworConfig, disabled, from_mapping, load
from nwor_vllm.errors import ConfigError


def test_off_without_the_setting():
    assert load({}, {}) is None
    assert load(None, {}) is None
    assert load({"nwor": False}, {}) is None
    assert load({"nwor": {"enabled": False}}, {}) is None
    assert load({"nwor": {}}, {"NWOR_DISABLE": "1"}) is None


def test_true_means_the_defaults():
    assert load({"nwor": True}, {}) == NworConfig() == load({"nwor": {}}, {})


def test_settings_win_over_variables_and_variables_over_defaults():
    environ = {"NWOR_POLICY": "off", "NWOR_EARLY_EXIT__THRESHOLD": "0.5", "NWOR_EARLY_EXIT__MIN_SURVIVAL": "0.1"}
    config = load({"nwor": {"policy": "fixed", "early_exit": {"threshold": 0.2}}}, environ)
    assert (config.policy, config.early_exit.threshold, config.early_exit.min_survival) == ("fixed", 0.2, 0.1)
    assert load({"nwor": True}, environ).policy == "off"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"polcy": "fixed"}, "unknown setting 'polcy'; did you mean 'policy'?"),
        ({"policy": "fixd"}, "unknown policy 'fixd'; did you mean 'fixed'?"),
        ({"policy": 3}, "policy is 3; expected str"),
        ({"policy": "fixed", "policy_params": {"kk": 3}}, "unknown setting 'policy_params.kk'"),
        ({"policy": "fixed", "policy_params": {"k": -2}}, "policy_params.k is -2"),
        ({"early_exit": {"threshold": -0.1}}, "early_exit.threshold is -0.1; expected a number in 0..1"),
        ({"early_exit": 0.5}, "early_exit is 0.5; expected an object"),
        ({"early_exit": {"threshold": True}}, "early_exit.threshold is True; expected float"),
        ({"ladder": [2, 1]}, "ladder is [2, 1]; expected ascending"),
        ({"ladder": [-1]}, "ladder is [-1]; expected draft lengths from 0 up"),
        ({"ladder": ["a"]}, "ladder[0] is 'a'; expected int"),
        ({"ladder": 3}, "ladder is 3; expected a list"),
        ({"policy_params": [1]}, "policy_params is [1]; expected an object"),
        ({"per_request": "yes"}, "per_request is 'yes'; expected bool"),
        ({"early_exit": {"threshold": float("nan")}}, "early_exit.threshold is nan; expected a number within 1e+12"),
        ({"policy_params": {"spread": 10**400}}, "expected a number within 1e+12"),
        ({"policy": "feedback", "policy_params": {"window": 10**30}}, "policy_params.window is 1000"),
        ({"policy": "feedback", "policy_params": {"initial": -1}}, "policy_params.initial is -1.0; expected a draft"),
        ({"policy": "acceptance", "policy_params": {"initial": 1.5}}, "policy_params.initial has 1.5; expected a num"),
        ({"policy": "acceptance", "policy_params": {"thresholds": [0.5, 2]}}, "policy_params.thresholds has 2.0"),
        ({"policy": "throughput", "policy_params": {"probe_interval": -1}}, "policy_params.probe_interval is -1; exp"),
        ({"policy": "throughput", "policy_params": {"low_accept_threshold": 2}}, "low_accept_threshold is 2.0; expect"),
        ([1], "additional_config.nwor is [1]"),
        ("on", "additional_config.nwor is 'on'"),
    ],
)
def test_mistakes_are_named(given, words):
    with pytest.raises(ConfigError) as error:
        load({"nwor": given}, {})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_variable_is_a_mistake_too():
    with pytest.raises(ConfigError, match="did you mean 'NWOR_POLICY'"):
        load({"nwor": True}, {"NWOR_POLCY": "off"})
    assert load({"nwor": True}, {"NWOR_ENV": "x", "PATH": "y"}) is not None


@given(st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.floats() | st.text(max_size=5), max_size=4))
def test_any_object_is_read_or_refused(data):
    try:
        config = from_mapping(NworConfig, data)
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(config, NworConfig)


@given(st.text())
def test_the_switch_reads_any_text(text):
    assert disabled({"NWOR_DISABLE": text}) == (text not in ("", "0"))
