"""What processes wait for."""

from __future__ import annotations

from prefopt import ranks


def test_files_of_other_ranks_are_waited_for_however_long_they_take(tmp_path, monkeypatch):
    """Looked for again and again, until the last one is there."""
    paths, looks = [tmp_path / "one", tmp_path / "two"], []

    def pause(seconds):
        looks.append(seconds)
        if len(looks) in (2, 5):
            paths[len(looks) // 4].touch()

    monkeypatch.setattr(ranks.time, "sleep", pause)
    ranks.wait_for_files(paths)
    assert len(looks) == 5
