"""Signals: at once where that is harmless, after the step where state must be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from autoseg.interrupts import Interrupted, Interrupts


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    made = Interrupts()
    made.install()
    yield made
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_at_once_and_tells_which_it_was(interrupts: Interrupts, kind: signal.Signals) -> None:
    with pytest.raises(Interrupted) as caught:
        signal.raise_signal(kind)
    assert caught.value.signum == kind == interrupts.signum


def test_a_deferred_signal_waits_until_it_is_asked_for(interrupts: Interrupts) -> None:
    with interrupts.deferred():
        interrupts.raise_if_requested()
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.signum == signal.SIGTERM
        with pytest.raises(Interrupted):
            interrupts.raise_if_requested()


def test_a_second_signal_does_not_wait(interrupts: Interrupts) -> None:
    with interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_after_the_deferred_part_signals_raise_at_once_again_even_after_an_error(interrupts: Interrupts) -> None:
    with pytest.raises(ZeroDivisionError), interrupts.deferred():
        raise ZeroDivisionError
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_is_no_error_that_a_case_could_swallow() -> None:
    assert not issubclass(Interrupted, Exception)


def test_without_installing_nothing_is_requested() -> None:
    idle = Interrupts()
    with idle.deferred():
        idle.raise_if_requested()
    assert idle.signum is None
