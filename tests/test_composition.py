"""One budget over several strategies is split so that all of them together keep it."""

from __future__ import annotations

import pytest

from vtp_plugin import config


def ratios(spec: str, **args: object) -> dict[str, object]:
    named = {key.replace("__", "."): value for key, value in args.items()}
    return {s.name: s.keep_ratio for s in config.resolve(spec, named)}


def test_ratios_multiply_to_the_budget():
    assert ratios("l2+atp", keep_ratio=0.25) == {"l2": 0.5, "atp": 0.5}
    shares = ratios("l2+atp+fastv", keep_ratio=0.2)
    assert list(shares.values()) == pytest.approx([0.2 ** (1 / 3)] * 3)


def test_a_strategy_without_a_budget_takes_no_part():
    assert ratios("vprune+l2+fastv", keep_ratio=0.25) == {"vprune": None, "l2": 0.5, "fastv": 0.5}
    assert ratios("vprune+fastv", keep_ratio=0.25) == {"vprune": None, "fastv": 0.25}


def test_what_one_has_of_its_own_is_taken_out_first():
    assert ratios("l2+atp", keep_ratio=0.2, l2__keep_ratio=0.5) == {"l2": 0.5, "atp": pytest.approx(0.4)}
    assert ratios("l2+atp", l2__keep_ratio=0.5, keep_ratio=0.2) == {"l2": 0.5, "atp": pytest.approx(0.4)}


def test_a_strategy_with_a_number_of_tokens_takes_no_part():
    assert ratios("l2+atp+fastv", keep_ratio=0.25, l2__keep_tokens=100) == {"l2": None, "atp": 0.5, "fastv": 0.5}


def test_the_whole_is_the_whole():
    assert ratios("l2+atp", keep_ratio=1) == {"l2": 1.0, "atp": 1.0}


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("strategies:\n- {strategy: l2, keep_ratio: 0.9}\n- {strategy: fastv, keep_ratio: 0.8}\n")
    assert ratios(str(file)) == {"l2": 0.9, "fastv": 0.8}
    assert ratios(str(file), keep_ratio=0.25) == {"l2": 0.5, "fastv": 0.5}


@pytest.mark.parametrize("value", [0, 2, -1, "half", True])
def test_a_wrong_budget_is_refused_as_ever(value: object):
    with pytest.raises(ValueError, match=r"(l2|atp): keep_ratio must be in \(0, 1\]"):
        ratios("l2+atp", keep_ratio=value)


def test_more_than_the_own_ratios_leave_is_refused():
    with pytest.raises(ValueError, match=r"keep_ratio=0.6 for all strategies together, but l2 alone keep less"):
        ratios("l2+atp", keep_ratio=0.6, l2__keep_ratio=0.5)


def test_nothing_left_to_share_is_refused():
    with pytest.raises(ValueError, match="each of them has its own already"):
        ratios("l2+atp", keep_ratio=0.6, l2__keep_ratio=0.5, atp__keep_ratio=0.5)


def test_other_fields_of_several_strategies_need_a_name():
    with pytest.raises(ValueError, match=r"'keep_tokens' is a field of several strategies; say l2.keep_tokens or atp"):
        ratios("l2+atp", keep_tokens=4)
