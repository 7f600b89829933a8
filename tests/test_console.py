"""What the user is told reaches him whatever the bars on the screen do."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from prefopt.console import say


class Restless(tqdm):
    """A bar that is cleared while another thread ends one of its own."""

    def clear(self, *args: Any, **kwargs: Any) -> None:
        super().clear(*args, **kwargs)
        self.other = tqdm(total=1)


def test_a_bar_of_another_thread_that_comes_or_goes_takes_no_line_away(capsys):
    with Restless(total=1) as bar:
        say("one", "two")
        bar.other.close()
    assert capsys.readouterr().out.split("\n")[:2] == ["one", "two"]
