"""Interleaved pairs of base and configuration: statistics on synthetic times, interleaving on a fake clock."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import numpy as np
import pytest

from mpq.timing.machine import Reading
from mpq.timing.pairs import Pairs, Timed, compare, gain_statistics, undisturbed

CALM = Reading(ticks=0, stolen=0, waited_s=0.0, clock_mhz=np.nan)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes time: the fake machine's times are its own, whatever the real one is doing."""
    monkeypatch.setattr("mpq.timing.pairs.reading", lambda: CALM)


class Machine:
    """A fake machine: a forward takes base or configured seconds, times a drift, plus a spike now and then."""

    def __init__(self, base_s: float, config_s: float, drift: float = 0.0, spike_every: int = 0):
        self.seconds, self.drift, self.spike_every = (base_s, config_s), drift, spike_every
        self.order = list[int]()

    def run(self, which: int) -> float:
        assert not gc.isenabled()
        self.order.append(which)
        n = len(self.order)
        return self.seconds[which] * (1 + self.drift * n) + (
            100.0 if self.spike_every and n % self.spike_every == 0 else 0.0
        )

    @property
    def both(self) -> tuple[Timed, Timed]:
        """Base and configuration, as compare takes them."""
        return partial(self.run, 0), partial(self.run, 1)


def alone(machine: Machine, repeats: int, seed: int = 0, **how: Any) -> Pairs:
    """One configuration of the fake machine beside its base."""
    base, config = machine.both
    return compare(base, [config], repeats, seed, **how)[0]


@pytest.mark.usefixtures("quiet")
def test_a_block_shares_its_base() -> None:
    """Six configurations: in each round all of them once, in an order of its own, base at both ends and after four; the seed repeats it."""

    def order(seed: int) -> list[str]:
        ran: list[str] = []

        def run(name: str) -> float:
            ran.append(name)
            return 3.0 if name == "base" else float(name)

        found = compare(partial(run, "base"), [partial(run, str(i)) for i in range(6)], 5, seed)
        for i, pairs in enumerate(found):
            np.testing.assert_allclose(pairs.base_s, 3.0)
            np.testing.assert_allclose(pairs.config_s, i)
        return ran

    ran = order(4)
    rounds = [ran[i : i + 9] for i in range(0, len(ran), 9)]
    assert len(rounds) == 5
    assert all([i for i, n in enumerate(r) if n == "base"] == [0, 5, 8] for r in rounds)
    assert all(sorted({*r} - {"base"}) == list("012345") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert ran == order(4) != order(5)
    assert gc.isenabled()


@pytest.mark.usefixtures("quiet")
def test_steady_drift_favours_nobody() -> None:
    """A machine that slows down by the same amount each run: six equal configurations gain nothing, wherever they stand."""
    ran = 0

    def run() -> float:
        nonlocal ran
        ran += 1
        return 1.0 + 0.01 * ran

    for pairs in compare(run, [run] * 6, 4):
        np.testing.assert_allclose(pairs.base_s, pairs.config_s)


@pytest.mark.usefixtures("quiet")
def test_drift_and_spikes_leave_the_gain() -> None:
    """With base and configuration equal, a machine that slows down threefold and stalls every seventh run shows no gain."""
    pairs = alone(Machine(1.0, 1.0, drift=0.05, spike_every=7), 21)
    gain, low, high = gain_statistics(pairs.base_s, pairs.config_s)
    assert abs(gain) <= 0.06
    assert low <= 0 <= high
    pairs = alone(Machine(1.0, 0.5, drift=0.01, spike_every=7), 21)
    gain, low, high = gain_statistics(pairs.base_s, pairs.config_s)
    assert 0.5 < gain < 0.84
    assert low > 0


@pytest.mark.usefixtures("quiet")
def test_a_target_stops_early_or_at_the_cap() -> None:
    """Steady timings stop at the repeats asked for, one wild among them or not; timings that never settle stop at the cap."""
    assert len(alone(Machine(1.0, 0.9), 5, target=0.01).base_s) == 5
    pairs = alone(Machine(1.0, 0.9, spike_every=4), 5, target=0.01, cap=12)
    assert len(pairs.base_s) + pairs.disturbed == 12
    wild = np.random.default_rng(0)
    steady, jumps = (lambda: 0.9), (lambda: wild.uniform(0.5, 1.0))
    assert len(compare(lambda: 1.0, [steady, steady, jumps], 3, target=0.01)[0].base_s) == 3
    assert len(compare(lambda: 1.0, [jumps, steady, jumps], 3, target=0.01, cap=7)[1].base_s) == 7


@pytest.mark.usefixtures("quiet")
def test_disturbed_pairs_are_measured_again() -> None:
    """A stall now and then is left out and made up for; a gain of half the time, on a drifting machine, is no disturbance."""
    pairs = alone(Machine(1.0, 0.5, drift=0.0005, spike_every=10), 15)
    assert len(pairs.base_s) == 15
    assert pairs.disturbed >= 2
    assert max(pairs.base_s.max(), pairs.config_s.max()) < 2
    assert alone(Machine(1.0, 0.5), 15).disturbed == 0


@pytest.mark.parametrize("waiting", [True, False])
def test_what_the_machine_did_meanwhile_decides_which_pairs_stay(
    monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    """During the third round a hypervisor takes half the cores: that pair, as fast as all others, is measured again. In the sixth
    the threads wait for a core: that disturbs as well, but not where the clock counts CPU seconds."""
    machine = Machine(1.0, 0.5)

    def at() -> Reading:
        ran = len(machine.order)  # three a round
        return Reading(100 * ran, 150 * (ran >= 9), 1e6 * (ran >= 18), np.nan)

    monkeypatch.setattr("mpq.timing.pairs.reading", at)
    pairs = alone(machine, 8, waiting=waiting)
    assert (pairs.disturbed, len(pairs.base_s)) == (2 if waiting else 1, 8)


def test_a_pair_beside_others_is_left_out_and_half_is_always_kept() -> None:
    """A pair during which the machine was not calm goes; where it never was, nothing does."""
    even, calm = np.ones(6), np.array([True, True, False, True, True, True])
    assert undisturbed(even, even, calm).tolist() == calm.tolist()
    assert undisturbed(even, even, np.zeros(6, dtype=bool)).all()


def test_no_pair_is_left_alone() -> None:
    """Of two pairs both stay: one alone would give its gain an interval of no width, which counts as certain."""
    steady = np.ones(2)
    assert undisturbed(steady, np.array([1.0, 3.0]), np.array([True, False])).all()
    assert undisturbed(steady, steady, np.array([True, True])).all()


def test_gain_is_the_median_difference() -> None:
    """By hand: differences 1, 1, 9 have median 1; equal differences have an interval of no width."""
    assert gain_statistics(np.array([2.0, 3.0, 10.0]), np.array([1.0, 2.0, 1.0]))[0] == 1.0
    assert gain_statistics(np.full(7, 2.0), np.full(7, 1.5)) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("pairs", [2, 3, 4, 5, 7, 15])
@pytest.mark.parametrize("spikes", [0.0, 0.1])
def test_the_interval_covers_the_true_gain(pairs: int, spikes: float) -> None:
    """Of 2000 synthetic measurements, drifting, with and without spikes, 95 in 100 intervals hold the truth, however few their pairs."""
    rng = np.random.default_rng(pairs)
    covered, widths = 0, list[float]()
    for _ in range(2000):
        noise = rng.normal(0, 0.05, (2, pairs))
        noise += rng.exponential(1.0, (2, pairs)) * (rng.random((2, pairs)) < spikes)
        base, config = noise + np.linspace(0, 0.5, pairs) + np.array([[1.0], [0.8]])
        _, low, high = gain_statistics(base, config)
        covered += low <= 0.2 <= high
        widths.append(high - low)
    assert covered >= 0.94 * 2000
    student = 2 * {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 7: 2.45, 15: 2.14}[pairs]
    if not spikes:
        assert np.median(widths) < 1.35 * student * 0.05 * np.sqrt(2 / pairs)


@pytest.mark.usefixtures("quiet")
def test_the_interval_covers_when_it_decides_how_long_to_measure() -> None:
    """Eight configurations a block on a noisy fake machine, measured until their intervals are narrow: they still hold the truth
    nineteen times in twenty, and fewer runs do than the cap."""
    rng, covered, ran, truths = np.random.default_rng(0), 0, 0, np.linspace(0.6, 1.1, 8)
    for block in range(40):
        timed = [partial(lambda t: t + rng.normal(0, 0.01), t) for t in truths]
        base = partial(lambda: 1.0 + rng.normal(0, 0.01))
        for pairs, truth in zip(
            compare(base, timed, 4, block, target=0.01, cap=20), truths, strict=True
        ):
            _, low, high = gain_statistics(pairs.base_s, pairs.config_s)
            covered += low <= 1 - truth <= high
            ran += len(pairs.base_s)
    assert covered >= 0.93 * 320
    assert ran < 0.6 * 20 * 320
