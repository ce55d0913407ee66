"""From registry to service: a real registry, a service and a clock that follow a script."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from deployments.rollout import BACKBONE_TAG, BASE_TAG, Rollout
from deployments.rollout_signals import Counts
from deployments.rollout_state import Mark, RolloutConfig
from deployments.rollout_target import Heads, Observed, ServiceUnavailable, heads_of, model_of, with_heads
from medusa.config import ConfigError
from registry.gate import GateRefused, GateResult
from registry.lease import Lease, LeaseHeldError, LeaseLostError
from registry.versions import DigestMismatchError, Registry, VersionRef

NAME, BACKBONE = "medusa-tiny", "sha256:backbone"
SHORT = RolloutConfig(baseline_s=8, watch_s=20, settle_timeout_s=30, away_s=20)
CONFIG = {
    "http_options": {"port": 8000},
    "applications": [
        {
            "name": "medusa",
            "import_path": "deployments.server:build_app",
            "args": {"model": "/models/tiny", "max_batch_size": 4},
        }
    ],
}


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits."""


@dataclass
class FakeService:
    """Takes what it is told after `delay_s`. `quality` says by digest how well it then does; "dead" never comes up."""

    name: str = "fake"
    config_now: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(CONFIG))
    quality: dict[str | None, Any] = field(default_factory=dict)
    backbone: str = BACKBONE
    delay_s: float = 7.0
    rate: float = 10.0  # requests a second
    now: float = 1000.0
    answers: bool = True
    deployed: list[tuple[Heads, bool]] = field(default_factory=list)
    _served: Heads = field(default_factory=Heads)
    _since: float = 1000.0
    _counted: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("a", "e", "d", "k"), 0.0))

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        seconds = max(seconds, 0.1)
        self.now += seconds
        if self.now - self._since >= self.delay_s and self.quality.get(heads_of(self.config_now).digest) != "dead":
            self._served = heads_of(self.config_now)
        errors, length = self._does()
        self._counted["a"] += seconds * self.rate * (1 - errors)
        self._counted["e"] += seconds * self.rate * errors
        self._counted["d"] += seconds * self.rate * 10
        self._counted["k"] += seconds * self.rate * 10 * (length - 1)

    def _does(self) -> tuple[float, float]:
        found = self.quality.get(self._served.digest, (0.0, 2.0))
        return (0.0, 1.0) if found == "dead" else found

    # Target
    def config(self) -> dict[str, Any]:
        return copy.deepcopy(self.config_now)

    def deploy(self, config: dict[str, Any]) -> None:
        in_place = any("user_config" in one for one in config["applications"][0].get("deployments", []))
        self.deployed.append((heads_of(config), in_place))
        self.config_now, self._since = copy.deepcopy(config), self.now

    def state(self) -> tuple[str, str]:
        if not self.answers:
            raise ServiceUnavailable("nobody is here")
        ready = heads_of(self.config_now) == self._served
        return ("ready", "well") if ready else ("changing", "on its way")

    # Signals and /version
    def read(self) -> dict[str, Counts]:
        if not self.answers:
            raise ServiceUnavailable("nobody is here")
        return {"r": Counts(*self._counted.values())}

    def observed(self, url: str) -> Observed:
        if not self.answers:
            raise ServiceUnavailable("nobody is here")
        return Observed(frozenset([self._served.digest]), self.backbone)

    @property
    def serves(self) -> str | None:
        return self._served.digest


@pytest.fixture(scope="session")
def mlflow_schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "schema.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@dataclass
class World:
    """A registry with its versions, a service, and rollouts that act on them."""

    folder: Path
    registry: Registry
    service: FakeService
    run_id: str
    backbone: str | None = None
    config: RolloutConfig = SHORT

    def register(
        self, content: str, *, gate: bool = True, backbone: str = BACKBONE, base: str | None = None
    ) -> VersionRef:
        checkpoint = self.folder / "checkpoints" / content
        checkpoint.mkdir(parents=True)
        (checkpoint / "medusa.json").write_text(json.dumps({"content": content}))
        tags = {BACKBONE_TAG: backbone, BASE_TAG: base or backbone}
        ref = self.registry.register(NAME, checkpoint, tags, self.run_id)
        champion = self.registry.champion(NAME)
        if gate:
            return self.registry.record_gate(ref, GateResult(True), champion.digest if champion else None)
        return ref

    def promote(self, content: str, **more: Any) -> VersionRef:
        return self.registry.promote(NAME, self.register(content, **more).version)

    def rollout(self, lease: Lease | None = None) -> Rollout:
        return Rollout(
            self.registry,
            NAME,
            self.service,  # type: ignore[arg-type]
            self.service,
            lease or self.lease,
            url="http://service",
            versions=self.folder / "versions",
            backbone=self.backbone,
            config=self.config,
            observed=self.service.observed,
            clock=self.service.clock,
            sleep=self.service.sleep,
        )

    def reconcile(self) -> str:
        return self.rollout().reconcile()

    def mark(self, ref: VersionRef) -> Mark | None:
        return Mark.of(self.registry.resolve(ref.uri), f"medusa.rollout.{self.service.name}")

    @property
    def champion(self) -> int:
        champion = self.registry.champion(NAME)
        assert champion is not None
        return champion.version

    def settled_on(self, ref: VersionRef) -> None:
        assert self.reconcile() == "rolled out"
        assert self.service.serves == ref.digest


@pytest.fixture
def world(tmp_path: Path, mlflow_schema: Path) -> Iterator[World]:
    uri = f"sqlite:///{shutil.copy(mlflow_schema, tmp_path / 'mlflow.db')}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("medusa", artifact_location=(tmp_path / "mlruns").as_uri())
    made = World(tmp_path, Registry(uri), FakeService(), client.create_run(experiment).info.run_id)
    (tmp_path / "lease").mkdir()
    made.lease = Lease(tmp_path / "lease")  # type: ignore[attr-defined]
    made.lease.acquire()  # type: ignore[attr-defined]
    yield made
    made.lease.release()  # type: ignore[attr-defined]


# Bringing a version in


def test_without_a_champion_nothing_is_done(world: World):
    assert world.reconcile() == "nothing to serve"
    world.register("a")
    assert world.reconcile() == "nothing to serve"
    assert world.service.deployed == []


def test_a_first_version_replaces_the_replicas_and_settles(world: World):
    ref = world.promote("a")
    world.settled_on(ref)
    ((heads, in_place),) = world.service.deployed
    assert (heads.version, heads.digest, in_place) == ("1", ref.digest, False)  # replicas without heads take none
    assert Path(heads.folder or "").is_dir()
    assert world.mark(ref).state == "settled"  # type: ignore[union-attr]
    assert world.reconcile() == "up to date"
    assert len(world.service.deployed) == 1


def test_later_heads_go_in_place(world: World):
    world.settled_on(world.promote("a"))
    second = world.promote("b")
    world.settled_on(second)
    assert world.service.deployed[-1][1] is True
    (deployment,) = world.service.config_now["applications"][0]["deployments"]
    assert deployment["user_config"]["heads_digest"] == second.digest
    assert world.service.config_now["applications"][0]["args"]["max_batch_size"] == 4


def test_an_adapter_replaces_the_replicas_on_the_same_model_and_heads_for_it_go_in_place(world: World):
    first = world.promote("a")
    world.settled_on(first)
    world.settled_on(world.promote("adapter", backbone="sha256:merged", base=BACKBONE))
    assert world.service.deployed[-1][1] is False
    world.service.backbone = "sha256:merged"
    world.settled_on(world.promote("other heads", backbone="sha256:merged", base=BACKBONE))
    assert world.service.deployed[-1][1] is True
    world.registry._set_alias(NAME, "champion", first.version)
    world.settled_on(first)
    assert world.service.deployed[-1][1] is False
    assert model_of(world.service.config_now) == "/models/tiny"  # all the time


def test_a_version_of_another_backbone_needs_its_folder_and_replaces_the_replicas(world: World):
    first = world.promote("a")
    world.settled_on(first)
    world.promote("b", backbone="sha256:other")
    with pytest.raises(ConfigError, match="--backbone"):
        world.reconcile()
    assert len(world.service.deployed) == 1
    world.backbone = "/models/other"
    assert world.reconcile() == "rolled out"
    assert model_of(world.service.config_now) == "/models/other"
    assert world.service.deployed[-1][1] is False
    # And back again, to the folder that the first ran on, without being told.
    world.service.backbone = "sha256:other"
    world.registry.rollback(NAME)
    assert world.reconcile() == "rolled out"
    assert model_of(world.service.config_now) == "/models/tiny"
    assert world.service.serves == first.digest


def test_a_champion_that_did_not_pass_the_gate_is_not_served(world: World):
    ref = world.register("a", gate=False)
    world.registry._set_alias(NAME, "champion", ref.version)  # as a hand in MLflow's page would
    with pytest.raises(GateRefused, match="without having passed the gate"):
        world.reconcile()
    assert world.service.deployed == []


def test_files_that_are_not_those_that_were_registered_are_not_served(world: World):
    ref = world.promote("a")
    (stored,) = (world.folder / "mlruns").rglob("medusa.json")
    stored.write_text('{"content": "changed"}')
    with pytest.raises(DigestMismatchError, match=ref.digest):
        world.reconcile()
    assert world.service.deployed == []


def test_what_somebody_else_applied_is_brought_back(world: World):
    """`kubectl apply` of the manifest takes the heads away: they come again."""
    ref = world.promote("a")
    world.settled_on(ref)
    world.service.deploy(copy.deepcopy(CONFIG))
    world.service.sleep(10)
    assert world.service.serves is None
    world.settled_on(ref)


# Going back


@pytest.mark.parametrize(
    ("quality", "reason"),
    [
        ((0.2, 2.0), "requests failed"),
        ((0.0, 1.5), "tokens a step"),
        ("dead", "not served by all replicas within 30 s"),
    ],
)
def test_a_worse_version_is_taken_back(world: World, quality: Any, reason: str):
    first = world.promote("a")
    world.settled_on(first)
    world.service.sleep(100)
    second = world.promote("b")
    world.service.quality[second.digest] = quality
    assert world.reconcile() == "went back"
    assert world.service.serves == first.digest
    assert world.champion == first.version
    mark = world.mark(second)
    assert mark is not None and mark.state == "failed" and reason in (mark.reason or "")
    assert world.reconcile() == "up to date"


def test_a_service_that_stops_answering_is_brought_back_all_the_same(world: World):
    first = world.promote("a")
    world.settled_on(first)
    second = world.promote("b")
    sleep, service = world.service.sleep, world.service

    def sleep_and_die(seconds: float) -> None:
        sleep(seconds)
        if heads_of(service.config_now).digest == second.digest:
            service.answers = service.now - service._since < service.delay_s + 6
        else:
            service.answers = service.now - service._since > service.delay_s

    service.sleep = sleep_and_die  # type: ignore[method-assign]
    assert world.reconcile() == "went back"
    assert service.serves == first.digest
    assert service.deployed[-1][1] is False  # who does not answer cannot take heads while it runs


def test_as_many_errors_as_before_are_no_reason(world: World):
    first = world.promote("a")
    world.service.quality = {first.digest: (0.1, 2.0), None: (0.1, 1.0)}
    world.service.sleep(100)
    world.settled_on(first)
    world.service.sleep(100)
    second = world.promote("b")
    world.service.quality[second.digest] = (0.1, 2.0)
    world.settled_on(second)


def test_a_version_is_compared_with_how_the_service_does_of_late(world: World):
    """Hours at three tokens a step are over: traffic has changed, and two are now what there is."""
    first = world.promote("a")
    world.service.quality[first.digest] = (0.0, 3.0)
    world.settled_on(first)
    world.service.sleep(10_000)
    world.service.quality[first.digest] = (0.0, 2.0)
    second = world.promote("b")
    world.service.quality[second.digest] = (0.0, 2.0)
    world.settled_on(second)


def test_too_few_requests_judge_nobody(world: World):
    world.settled_on(world.promote("a"))
    second = world.promote("b")
    world.service.rate = 0.1
    world.service.quality[second.digest] = (1.0, 1.0)
    world.settled_on(second)


def test_a_first_version_that_fails_leaves_plain_decoding(world: World):
    ref = world.promote("a")
    world.service.quality[ref.digest] = (0.5, 2.0)
    assert world.reconcile() == "went back"
    assert world.service.serves is None
    assert heads_of(world.service.config_now) == Heads()
    deployed = len(world.service.deployed)
    assert world.reconcile() == "went back"  # it stays so, and nothing more is done
    assert len(world.service.deployed) == deployed


def test_two_failures_in_a_row_do_not_go_round_in_circles(world: World):
    first = world.promote("a")
    world.settled_on(first)
    second = world.promote("b")
    world.service.quality[second.digest] = "dead"
    assert world.reconcile() == "went back"
    # Now the first does badly too, when it is brought in anew: the second, failed, is no refuge.
    world.service.deploy(copy.deepcopy(CONFIG))
    world.service.quality[first.digest] = (0.9, 2.0)
    world.service.sleep(10)
    assert world.reconcile() == "went back"
    assert world.service.serves is None


def test_a_failed_version_can_be_tried_again_when_asked_for(world: World):
    first = world.promote("a")
    world.settled_on(first)
    second = world.promote("b")
    world.service.quality[second.digest] = "dead"
    assert world.reconcile() == "went back"
    world.service.quality.clear()
    world.registry.rollback(NAME)  # the operator: previous (the second) is champion again
    assert world.reconcile() == "went back"
    world.registry.rollback(NAME)
    work = world.rollout()
    work.forget_failure()
    assert work.reconcile() == "rolled out"
    assert world.service.serves == second.digest


def test_an_operator_who_rolls_back_does_not_wait_for_the_watch(world: World):
    first = world.promote("a")
    world.settled_on(first)
    world.promote("b")
    sleep, started = world.service.sleep, world.service.now

    def sleep_then_roll_back(seconds: float) -> None:
        sleep(seconds)
        if world.service.now - started > 12 and world.champion != first.version:
            world.registry.rollback(NAME)

    world.service.sleep = sleep_then_roll_back  # type: ignore[method-assign]
    assert world.reconcile() == "superseded"
    world.settled_on(first)


# Kills and leases


def killed_at(number: int, world: World, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Reconciles, but dies in the place of the change of that number, or just after it; False where there is none."""
    count = itertools.count()
    with monkeypatch.context() as patch:
        for owner, name in (
            (world.service, "deploy"),
            (world.registry._client, "set_model_version_tag"),
            (world.registry._client, "set_registered_model_alias"),
        ):
            patch.setattr(owner, name, _dying(getattr(owner, name), count, number))
        try:
            world.reconcile()
        except Killed:
            return True
    return False


def _dying(work: Callable[..., Any], count: Iterator[int], number: int) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        if next(count) == number:
            raise Killed
        result = work(*args, **more)
        if next(count) == number:
            raise Killed
        return result

    return call


@pytest.mark.parametrize(
    "quality",
    [
        pytest.param((0.0, 2.0), id="good", marks=pytest.mark.slow),
        pytest.param((0.5, 2.0), id="worse"),
        pytest.param("dead", id="dead", marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_point_leaves_something_to_go_on_from(
    world: World, monkeypatch: pytest.MonkeyPatch, quality: Any
):
    first = world.promote("a")
    world.settled_on(first)
    for attempt in itertools.count():
        world.service.sleep(50)
        champion = world.registry.champion(NAME)
        assert champion == first
        second = world.promote(f"version-{attempt}")
        world.service.quality[second.digest] = quality
        was_killed = killed_at(attempt, world, monkeypatch)
        for _ in range(4):  # whoever comes next
            outcome = world.reconcile()
            if outcome == "up to date":
                break
        assert outcome == "up to date"
        good = second if quality == (0.0, 2.0) else first
        assert world.service.serves == good.digest
        assert heads_of(world.service.config_now).digest == good.digest
        assert world.champion == good.version
        assert world.mark(good).state == "settled"  # type: ignore[union-attr]
        if not was_killed:
            break
        if good == second:
            world.registry.rollback(NAME)
            world.settled_on(first)
    assert attempt >= (6 if good == second else 10)


def test_one_acts_at_a_time(world: World):
    with pytest.raises(LeaseHeldError):
        Lease(world.folder / "lease").acquire()


def test_who_has_lost_the_lease_changes_nothing(world: World):
    ref = world.promote("a")
    path = world.folder / "lease" / "lease.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "expires": 0}))
    other = Lease(world.folder / "lease")
    other.acquire()
    with pytest.raises(LeaseLostError):
        world.reconcile()
    assert world.service.deployed == [] and world.mark(ref) is None
    other.release()


# The configuration


def test_in_place_changes_user_config_alone_and_by_replacing_changes_the_args_alone():
    heads = Heads("/versions/x", "3", "sha256:x")
    changed = with_heads(CONFIG, heads, in_place=True)
    assert changed["applications"][0]["args"] == CONFIG["applications"][0]["args"]
    assert heads_of(changed) == heads
    again = with_heads(changed, Heads("/versions/y", "4", "sha256:y"), in_place=False, model="/models/other")
    assert heads_of(again).version == "4" and model_of(again) == "/models/other"
    assert again["applications"][0]["deployments"] == []  # or user_config would win over the args
    assert "deployments" not in CONFIG["applications"][0]


def test_a_pinned_backbone_follows_the_version():
    config = copy.deepcopy(CONFIG)
    config["applications"][0]["args"]["backbone_digest"] = "sha256:old"
    changed = with_heads(config, Heads(), in_place=False, backbone_digest="sha256:new")
    assert changed["applications"][0]["args"]["backbone_digest"] == "sha256:new"
    assert "backbone_digest" not in with_heads(changed, Heads(), in_place=False)["applications"][0]["args"]
    unpinned = with_heads(CONFIG, Heads(), in_place=False, backbone_digest="sha256:new")
    assert "backbone_digest" not in unpinned["applications"][0]["args"]


def test_other_settings_of_the_deployment_stay():
    config = copy.deepcopy(CONFIG)
    config["applications"][0]["deployments"] = [
        {"name": "MedusaServer", "max_ongoing_requests": 7, "user_config": {"heads": "/old"}},
        {"name": "Other"},
    ]
    changed = with_heads(config, Heads(), in_place=False)
    assert changed["applications"][0]["deployments"] == [
        {"name": "Other"},
        {"name": "MedusaServer", "max_ongoing_requests": 7},
    ]


def test_a_configuration_without_the_application_is_named():
    with pytest.raises(ConfigError, match="no application named medusa"):
        heads_of({"applications": [{"name": "other"}]})


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="watch_s must be 0 or more, got -1"):
        RolloutConfig(watch_s=-1)
