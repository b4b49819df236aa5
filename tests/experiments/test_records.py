"""Raw records survive a kill and are of one study."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.validity.records import Records, rows
from papo.errors import PapoError

SETTINGS = {"sizes": (0.1, 1e-6), "config": {"seed": 1}}


def filled(path: Path) -> Records:
    records = Records(path, SETTINGS)
    for batch in (0, 1):
        records.append(batch, [{"x": 10.0 * batch + i} for i in range(3)])
    return records


def test_a_study_goes_on_after_its_last_whole_batch(tmp_path: Path) -> None:
    path = tmp_path / "new" / "own-mawps.jsonl"
    assert filled(path).done == {0, 1}
    assert [row["x"] for row in rows(path)] == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]
    for lost in (3, 40):  # half a line; more than one
        path.write_text(path.read_text()[:-lost])
        again = Records(path, SETTINGS)
        assert again.done == {0}
        again.append(1, [{"x": float(i)} for i in range(3)])
        assert [row["x"] for row in rows(path)] == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]


def test_records_of_other_settings_are_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "own-mawps.jsonl"
    filled(path)
    before = path.read_text()
    with pytest.raises(PapoError, match=r"own-mawps\.jsonl: measured with other settings than now"):
        Records(path, {**SETTINGS, "config": {"seed": 2}})
    assert path.read_text() == before
    path.unlink()
    assert Records(path, {**SETTINGS, "config": {"seed": 2}}).done == set()
