from __future__ import annotations

from nwor_vllm.policy.price import TRIED, Price


def priced(value: float, slot: float) -> Price:
    price = Price()
    price.restore({"known": True, "value": value, "slot": slot})
    return price


def test_a_price_below_which_one_request_never_drafts_falls_to_its_slope() -> None:
    """All drafts ended above .4: thresholds up to there are equally good, and none of them says that .4 is too high."""
    price = priced(0.4, slot=0.03)
    for _ in range(20):
        price._move(TRIED[TRIED <= 0.4], requests=1)
    assert abs(price.value - 0.03) < 0.01


def test_what_thresholds_tell_is_kept_to_whatever_the_slope_says() -> None:
    price = priced(0.4, slot=0.03)
    for _ in range(20):
        price._move(TRIED[(TRIED >= 0.2) & (TRIED <= 0.3)], requests=1)
    assert 0.19 < price.value < 0.21


def test_of_many_requests_some_draft_below_it() -> None:
    price = priced(0.4, slot=0.03)
    for _ in range(5):
        price._move(TRIED[TRIED <= 0.4], requests=64)
    assert price.value > 0.39
