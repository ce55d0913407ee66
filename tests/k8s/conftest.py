"""The manifests of each overlay, as kubectl kustomize makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.k8s.support import ROOT

OVERLAYS = ("dev", "prod")


@pytest.fixture(scope="session", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def manifest_text(overlay: str) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail("kubectl is missing, and REQUIRE_SERVICES=1 asks for it")
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(ROOT / "k8s" / "overlays" / overlay)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower()
    return done.stdout


@pytest.fixture(scope="session")
def manifests(manifest_text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(manifest_text) if one]
