"""From the registry to the running service: the champion is verified, brought in, watched, and taken back if worse.

    the champion        is what should run, unless this service has marked it as failed
    heads only          for what runs already: by user_config, running replicas swap them in place
    anything else       by the args: Serve replaces the replicas one after another
    then                wait until all replicas answer with the new digest; watch errors and tokens a step; settle
    worse, or not well  mark the version as failed, move the champion back to `previous`, and bring that in

All state is in two places that outlive any process: what the service is told to run, and a tag on the version
(`medusa.rollout.<service>`). A kill at any point leaves one of the states below, and the next process goes on from it.
Who acts holds a lease, and every change is made while it is held.

    started    told to the service, or about to be; `baseline` is how it did before
    settled    watched for the whole time
    failed     `reason` says why; it is not brought in again before `forget_failure`
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from deployments.rollout_signals import Counts, Reading, Signals, since, total
from deployments.rollout_state import Mark, RolloutConfig
from deployments.rollout_target import (
    Heads,
    Observed,
    ServiceUnavailable,
    Target,
    heads_of,
    model_of,
    observe,
    with_heads,
)
from deployments.rollout_verdict import in_words, why_worse
from medusa.config import ConfigError
from registry.connection import MlflowUnavailable
from registry.gate import GateRefused
from registry.lease import Lease
from registry.versions import GATE_TAG, PREVIOUS, Registry, VersionRef

logger = logging.getLogger(__name__)

BACKBONE_TAG, BASE_TAG = "medusa.backbone.digest", "medusa.backbone.base_digest"
Outcome = Literal["nothing to serve", "up to date", "rolled out", "went back", "superseded"]


class RolloutFailed(RuntimeError):
    """The version does worse than what ran before, or does not come up; the message is the reason."""


class Superseded(RuntimeError):
    """While a version was brought in, another became champion."""


class Rollout:
    """Brings `name`'s champion into `target`. `url` is where the service answers requests."""

    def __init__(
        self,
        registry: Registry,
        name: str,
        target: Target,
        signals: Signals,
        lease: Lease,
        *,
        url: str,
        versions: Path,
        backbone: str | None = None,
        config: RolloutConfig | None = None,
        observed: Callable[[str], Observed] = observe,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._registry, self._name, self._target, self._signals, self._lease = registry, name, target, signals, lease
        self._url, self._versions, self._backbone = url, versions, backbone
        self._config = config or RolloutConfig()
        self._observed, self._clock, self._sleep = observed, clock, sleep
        self._key = f"medusa.rollout.{target.name}"

    def reconcile(self) -> Outcome:
        """One look at registry and service, and what follows from it. The lease must be held.

        GateRefused for a champion that has not passed the gate, DigestMismatchError for one whose files are not those
        that were registered: then nothing is changed. TryAgain while the registry or the service is away.
        """
        champion = self._registry.champion(self._name)
        if champion is None:
            return "nothing to serve"
        mark = Mark.of(champion, self._key)
        if mark is not None and mark.state == "failed":
            return self._go_back(champion)
        running = heads_of(self._target.config())
        if running.digest == champion.digest and mark is not None and mark.state == "settled":
            self._wait_for(champion.digest, champion.uri)  # its bringer may have been killed before it was there
            return "up to date"
        try:
            if running.digest != champion.digest or mark is None:
                mark = self._start(champion)
            self._settle(champion.digest, champion)
            self._watch(champion, mark)
        except Superseded:
            logger.warning("%s: %s is no longer the champion", self._target.name, champion.uri)
            return "superseded"
        except RolloutFailed as failure:
            logger.error("%s: %s does worse: %s", self._target.name, champion.uri, failure)
            self._write(champion, Mark(state="failed", reason=str(failure), model=mark.model))
            return self._go_back(self._registry.resolve(champion.uri))
        self._write(champion, replace(mark, state="settled"))
        logger.warning("%s: %s has settled", self._target.name, champion.uri)
        return "rolled out"

    def forget_failure(self) -> None:
        """Lets a champion that failed here be tried once more."""
        champion = self._registry.champion(self._name)
        if champion is not None:
            with self._acting():
                self._registry.tag(champion, {self._key: ""})

    def _start(self, version: VersionRef) -> Mark:
        """Verifies the version, writes down how the service does now, and tells it to serve the version."""
        if version.tags.get(GATE_TAG) != "passed":
            raise GateRefused(version.uri, ("it is champion without having passed the gate; run `medusa promote`",))
        config = self._target.config()
        heads, in_place, model = self._plan(version, config)
        mark = Mark(state="started", baseline=self._baseline(), model=model)
        self._write(version, mark)
        if heads_of(config) != heads:
            with self._acting():
                self._deploy(config, heads, version, in_place, model)
            way = "in place" if in_place else "by replacing the replicas"
            logger.warning("%s: %s goes in, %s", self._target.name, version.uri, way)
        return mark

    def _plan(self, version: VersionRef, config: dict[str, Any]) -> tuple[Heads, bool, str]:
        """What to tell the service, whether running replicas can take it, and the folder of the model.

        A version with an adapter runs on its base model: replicas merge the two when they start. So the folder stays
        while the base is the same, and heads go in place while what they run on is.
        """
        folder = self._registry.download(version, self._versions / version.digest.removeprefix("sha256:")[:16])
        running, model = heads_of(config), model_of(config)
        heads = Heads(str(folder.resolve()), str(version.version), version.digest)
        told = self._registry.find(self._name, running.digest) if running.digest else None
        served, answers = self._served_backbone(told)
        base = _base_digest(told) if told else served
        in_place = answers and running.digest is not None and version.tags.get(BACKBONE_TAG) == served
        if base is None or _base_digest(version) == base:
            return heads, in_place, model
        before = Mark.of(version, self._key)
        other = (before.model if before else None) or self._backbone
        if other is None or other == model:
            raise ConfigError(
                f"{version.uri} belongs to the model {_base_digest(version)}, but {self._target.name} serves {base}; "
                "give the folder of its model with --backbone"
            )
        return heads, False, other

    def _deploy(
        self, config: dict[str, Any], heads: Heads, version: VersionRef | None, in_place: bool, model: str
    ) -> None:
        digest = version.tags.get(BACKBONE_TAG) if version else None
        self._target.deploy(with_heads(config, heads, in_place=in_place, model=model, backbone_digest=digest))

    def _served_backbone(self, told: VersionRef | None) -> tuple[str | None, bool]:
        """The digest of what serves, and whether the service answers. One that does not is taken for what it was
        told to be: going back must not depend on what is broken."""
        try:
            return self._observed(self._url).backbone_digest, True
        except ServiceUnavailable:
            return (told.tags.get(BACKBONE_TAG) if told else None), False

    def _settle(self, digest: str | None, champion: VersionRef | None) -> None:
        """Until every answer comes from replicas with these heads, or `champion` (if given) is no longer that."""
        deadline = self._clock() + self._config.settle_timeout_s
        said = "no answer yet"
        while True:
            try:
                state, said = self._target.state()
                if state == "failed":
                    raise RolloutFailed(said)
                if state == "ready":
                    found = self._observed(self._url).digests
                    if found == {digest}:
                        return
                    said = f"replicas answer with {', '.join(sorted(map(str, found)))}"
            except ServiceUnavailable as error:
                said = str(error)
            self._require_champion(champion)
            if self._clock() > deadline:
                raise RolloutFailed(f"not served by all replicas within {self._config.settle_timeout_s:.0f} s: {said}")
            self._sleep(self._config.poll_s)

    def _watch(self, version: VersionRef, mark: Mark) -> None:
        """For `watch_s`; RolloutFailed as soon as there is enough to say that it is worse."""
        started = answered = self._clock()
        first: Reading | None = None
        seen, before = Counts(), Counts(**mark.baseline or {})
        while True:
            now = self._clock()
            try:
                state, said = self._target.state()
                reading = self._signals.read()
                first = reading if first is None else first
                answered, seen = now, since(reading, first)
            except ServiceUnavailable as error:
                state, said = "changing", str(error)
            if state == "failed" or now - answered > self._config.away_s:
                raise RolloutFailed(said)
            if reason := why_worse(seen, before, self._config):
                raise RolloutFailed(reason)
            self._require_champion(version)
            if now - started >= self._config.watch_s and answered == now:
                logger.warning("%s: %s watched, %s", self._target.name, version.uri, in_words(seen))
                return
            self._sleep(self._config.poll_s)

    def _require_champion(self, version: VersionRef | None) -> None:
        """An operator who moves the alias need not wait for the end of a watch. MLflow may be away: then it is."""
        try:
            if version is not None and self._registry.champion(self._name) != version:
                raise Superseded
        except MlflowUnavailable as error:
            logger.warning("%s", error)

    def _go_back(self, failed: VersionRef) -> Outcome:
        """`previous` becomes champion and is brought in; where that is none or has failed too, plain decoding is.

        Neither is watched: both have served before, and are what there is.
        """
        target = self._back_to(failed)
        config, what = self._target.config(), target.uri if target else "plain decoding"
        if target is None:
            heads, in_place, model = Heads(), False, model_of(config)
        else:
            heads, in_place, model = self._plan(target, config)
        if heads_of(config) != heads:
            with self._acting():
                self._deploy(config, heads, target, in_place, model)
            logger.error("%s: back to %s, as %s failed", self._target.name, what, failed.uri)
        self._wait_for(heads.digest, what)
        if target is not None:
            self._write(target, Mark(state="settled", model=model))
        return "went back"

    def _wait_for(self, digest: str | None, what: str) -> None:
        """As `_settle`, for what is no candidate: if it does not come up, there is nothing better to go to."""
        try:
            self._settle(digest, None)
        except RolloutFailed as failure:
            raise ServiceUnavailable(f"{self._target.name} does not come up with {what}: {failure}") from failure

    def _back_to(self, failed: VersionRef) -> VersionRef | None:
        previous = self._registry.aliases(self._name).get(PREVIOUS)
        if previous is None or previous == failed.version:
            return None
        version = self._registry.resolve(f"models:/{self._name}/{previous}")
        mark = Mark.of(version, self._key)
        if mark is not None and mark.state == "failed":
            return None
        with self._acting():
            return self._registry.rollback(self._name)

    def _baseline(self) -> dict[str, float] | None:
        """Of late, where there was enough to judge by; else of the replicas' whole life, with whatever they served."""
        try:
            before = self._signals.read()
            self._sleep(self._config.baseline_s)
            now = self._signals.read()
        except ServiceUnavailable as error:
            logger.warning("%s: nothing to compare with: %s", self._target.name, error)
            return None
        late = since(now, before)
        return (late if late.requests >= self._config.min_requests else total(now)).to_dict()

    def _write(self, version: VersionRef, mark: Mark) -> None:
        text = json.dumps(asdict(replace(mark, time=round(self._clock(), 3))))
        with self._acting():
            self._registry.tag(version, {self._key: text})

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """LeaseLostError where somebody else acts by now."""
        with self._lease.while_held():
            yield


def _base_digest(version: VersionRef) -> str | None:
    """Of the model's folder: the backbone itself, or what an adapter makes it of."""
    return version.tags.get(BASE_TAG) or version.tags.get(BACKBONE_TAG)
