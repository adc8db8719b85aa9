"""The time model against 17 clean steps that others measured and published."""

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fd_large.plan.step_time import HOOKS, PRODUCTS, REST, StepSeconds

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture
def public(monkeypatch):
    """The module of benchmarks/public_rates.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import public_rates

    return public_rates


@pytest.fixture
def clean(public):
    """The clean rows, each with the counts of its model."""
    rows, counts = public.read()
    return [(row, counts[row.net]) for row in rows if row.clean]


def log_ratios(public, rows, factors):
    """Logarithms of planned over measured seconds of each row.

    Args:
        public: The module.
        rows: Rows and counts.
        factors: What the constants for products (Ampere, Hopper) and bytes are multiplied by.
    """
    ampere, hopper, bytes_ = factors
    ratios = []
    for row, counts in rows:
        products = ampere if row.card in ("a100", "rtx3090") else hopper
        rates = replace(
            row.rates,
            matmul=products * row.rates.matmul,
            bandwidth=bytes_ * row.rates.bandwidth,
        )
        ratios.append(np.log(public.planned(row, counts, rates).total / row.seconds))
    return np.array(ratios)


def fitted(public, rows):
    """Returns by what to multiply the three fitted constants for the least squares over rows."""
    logs = np.zeros(3)
    for _ in range(6):  # Gauss-Newton.
        now = log_ratios(public, rows, np.exp(logs))
        moved = [log_ratios(public, rows, np.exp(logs + 1e-4 * unit)) for unit in np.eye(3)]
        slopes = (np.stack(moved, axis=1) - now[:, None]) / 1e-4
        logs -= np.linalg.lstsq(slopes, now, rcond=None)[0]
    return np.exp(logs)


def test_each_clean_row_is_within_its_range(public, clean):
    assert len(clean) == 17
    assert public.outside(*public.read()) == []
    errors = np.abs(np.exp(log_ratios(public, clean, (1, 1, 1))) - 1)
    assert statistics.median(errors) <= 0.10
    assert max(errors) <= 0.25


def test_the_constants_are_the_fit(public, clean):
    assert fitted(public, clean) == pytest.approx([1, 1, 1], abs=0.015)


def test_a_row_is_foretold_by_the_others(public, clean):
    """Hooks are not fitted: the two rows that show them would foretell each other worse."""
    errors = []
    for left_out in clean:
        factors = fitted(public, [one for one in clean if one is not left_out])
        errors.append(abs(np.exp(log_ratios(public, [left_out], factors)[0]) - 1))
    assert sum(error <= 0.25 for error in errors) >= 15
    assert max(errors) <= 0.26


def test_zero_3_is_slower_than_ddp_where_both_were_measured(public):
    rows, counts = public.read()
    planned = {row.id: public.planned(row, counts[row.net], row.rates) for row in rows}
    for net in ("vitl", "vite"):
        ddp, zero3 = (planned[f"spt-{net}-{sharding}"] for sharding in ("ddp", "zero3"))
        assert zero3.between.low > ddp.total
        # They add to the step, however long its products are.
        assert zero3.parts[HOOKS] > 0.35 * (zero3.parts[PRODUCTS] + zero3.parts[REST])
        assert HOOKS not in ddp.parts


def test_hooks_have_a_range_of_their_own():
    parts = {PRODUCTS: 1.0, HOOKS: 0.2}
    step = StepSeconds(parts=parts, communication=1.0, finish=0.5, accumulation=2, overlap=True)
    assert step.total == pytest.approx(2 * 1.2 + 0.5)
    assert step.between.low == pytest.approx(2 * (0.8 + 0.1) + 0.8 * 0.5)
    assert step.between.high == pytest.approx(2 * (1.25 + 0.32) + 1.25 * 0.5)
    plain = replace(step, parts={PRODUCTS: 1.0})
    assert plain.between == pytest.approx((0.8 * plain.total, 1.25 * plain.total))


def test_no_row_waits_for_python_or_the_network(public, clean):
    """So the rows hold four constants, and not what is assumed of calls and links."""
    for row, counts in clean:
        seconds = public.planned(row, counts, row.rates)
        assert seconds.computation > seconds.communication
        fast = public.planned(row, counts, replace(row.rates, launch_seconds=0.0, hooked_share=0.0))
        hooks = seconds.parts.get(HOOKS, 0.0)
        assert fast.computation == pytest.approx(seconds.computation - hooks)


def test_a_row_that_leaves_its_range_fails_the_benchmark(public, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(public, "plot", lambda rows, counts, path: None)
    assert public.report() == 0
    rows, counts = public.read()
    slower = [replace(row, seconds=1.6 * row.seconds) for row in rows]
    monkeypatch.setattr(public, "read", lambda: (slower, counts))
    assert public.report() == 1
    assert "spt-vite-zero3" in capsys.readouterr().out


def test_the_page_says_how_far_planned_seconds_are_off(public, clean):
    errors = 100 * np.abs(np.exp(log_ratios(public, clean, (1, 1, 1))) - 1)
    page = " ".join(PAGE.read_text().split())
    assert f"All {len(clean)} [public measurements]" in page
    assert (
        f"off by {statistics.median(errors):.0f} % (median) and at most {max(errors):.0f} %" in page
    )


@pytest.mark.sweep
def test_the_models_count_as_they_did(public, capsys, monkeypatch, tmp_path):
    """If this fails: python benchmarks/public_rates.py, and the constants anew."""
    kept = tmp_path / "public_rates.json"
    kept.write_text(public.FILE.read_text())
    monkeypatch.setattr(public, "FILE", kept)
    public.count_again()
    assert "changed" not in capsys.readouterr().out
