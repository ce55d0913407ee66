"""Manifests of steps that were changed after they were complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.manifest import DamagedStepError
from tests.pipelines.test_artifact import Config, opened, write_and_commit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "table" / "part-0").unlink(), "table/part-0 is missing"),
        (lambda path: (path / "table" / "part-0").write_text("row"), "has 3 bytes, but was committed with 4"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (
            lambda path: (path / "manifest.json").write_text(
                (path / "manifest.json").read_text().replace('"written": 3', '"written": 4')
            ),
            "does not match its own digest",
        ),
    ],
)
def test_a_damaged_step_is_refused_with_a_remedy(tmp_path: Path, damage, message: str):
    path = write_and_commit(tmp_path).path
    damage(path)
    with pytest.raises(DamagedStepError, match=message) as error, opened(tmp_path):
        pass
    assert f"{path} is damaged" in str(error.value) and "remove the folder" in str(error.value)


def test_a_manifest_moved_to_another_key_is_refused(tmp_path: Path):
    path = write_and_commit(tmp_path).path
    with opened(tmp_path, Config(rows=4)) as other:
        other_path = other.path
    (path / "manifest.json").rename(other_path / "manifest.json")
    with pytest.raises(DamagedStepError, match="belongs to the key"), opened(tmp_path, Config(rows=4)):
        pass
