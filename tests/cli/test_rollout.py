"""`medusa rollout --every`: waits for the lease, outlives what is away, ends when the lease is lost or on a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from cli import main as command
from cli import rollout
from deployments.rollout_target import ServiceUnavailable
from registry.connection import MlflowUnavailable
from registry.gate import GateRefused
from registry.lease import LeaseHeldError, LeaseLostError


class FakeLease:
    def __init__(self, held_by_others: int = 0) -> None:
        self.held_by_others, self.released = held_by_others, False

    def acquire(self) -> None:
        if self.held_by_others:
            self.held_by_others -= 1
            raise LeaseHeldError("somebody else acts")

    def release(self) -> None:
        self.released = True


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rollout.time, "sleep", lambda _: None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_it_waits_for_the_lease_and_outlives_what_is_away():
    lease, asked = FakeLease(held_by_others=3), []
    happenings = iter(
        [
            MlflowUnavailable("MLflow is away"),
            "rolled out",
            ServiceUnavailable("no answer"),
            GateRefused("models:/m/3", ("by hand",)),
            "up to date",
            LeaseLostError("taken over"),
        ]
    )

    def once(given: FakeLease, retry: bool) -> str:
        assert given is lease and lease.held_by_others == 0
        asked.append(retry)
        happening = next(happenings)
        if isinstance(happening, Exception):
            raise happening
        return happening

    with pytest.raises(LeaseLostError):
        rollout._for_ever(lambda: lease, once, 1.0, True)
    assert asked == [True, True, False, False, False, False]  # a failure is forgotten once
    assert lease.released


def test_a_signal_gives_the_lease_back():
    lease = FakeLease()

    def once(given: FakeLease, retry: bool) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "not reached"

    with pytest.raises(SystemExit) as ended:
        rollout._for_ever(lambda: lease, once, 1.0, False)
    assert ended.value.code == 0 and lease.released


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollout", "m", "--tracking-uri=x", "--service=medusa"], "neither rayservice/NAME nor an address"),
        (["rollout", "m", "--tracking-uri=x", "--service=rayservice/medusa"], "no pod of a Kubernetes cluster"),
        (["rollout", "m", "--tracking-uri=x", "--watch=-1"], "watch_s must be 0 or more"),
        (["submit", "medusa-pipeline"], "no pod of a Kubernetes cluster"),
        (["submit", "medusa-pipeline", "--started-by=???"], "holds no letter or digit"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    result = CliRunner().invoke(command.app, arguments)
    assert words in str(result.exception)
