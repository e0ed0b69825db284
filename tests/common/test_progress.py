"""Bars on a terminal, log lines elsewhere, right counts in both."""

import io
import logging
import threading

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console

from tasks.common.progress import ProgressBars, format_rate, track
from tasks.common.training_progress import LogProgress, training_progress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def quiet(clock: Clock) -> ProgressBars:
    return ProgressBars(console=Console(file=io.StringIO(), force_terminal=False), log_every=10, clock=clock)


def test_without_a_terminal_a_line_is_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with quiet(clock) as bars, bars.add("features", total=100, unit="tiles") as bar:
        for _ in range(10):
            clock.now += 4
            bar.advance(10)
    assert caplog.messages == [
        "features: 30 of 100 tiles (30%), 2.5 tiles/s, 28 s left",
        "features: 60 of 100 tiles (60%), 2.5 tiles/s, 16 s left",
        "features: 90 of 100 tiles (90%), 2.5 tiles/s, 4 s left",
        "features: 100 tiles in 40 s, 2.5 tiles/s",
    ]
    assert bars.console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_what_an_earlier_run_has_done_has_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with quiet(clock) as bars, bars.add("fold", total=100, unit="epochs", passing=True) as bar:
        for epoch in range(61, 64):
            clock.now += 5
            bar.reach(epoch)
    assert caplog.messages == ["fold: 62 of 100 epochs (62%), 12.0 epochs/min, 3 min 10 s left"]


def test_passing_bars_do_not_log_their_end_and_unknown_totals_have_no_share(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with quiet(clock) as bars:
        with bars.add("a slide", unit="tiles", passing=True) as bar:
            clock.now += 20
            bar.advance(4000)
        clock.now += 3600 * 2
        with bars.add("cohort", unit="slides") as bar:
            clock.now += 185
            bar.advance()
        bar.close()
    assert caplog.messages == [
        "a slide: 4000 tiles, 200 tiles/s",
        "cohort: 1 slides, 0.3 slides/min",
        "cohort: 1 slides in 3 min 05 s, 0.3 slides/min",
    ]


def test_on_a_terminal_bars_with_counts_and_rates_are_drawn() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressBars(console=console) as bars:
        cohort = bars.add("cohort [1]", total=2, unit="slides")  # brackets are text, not markup
        with bars.add("slide", total=3, unit="tiles", passing=True) as one:
            one.advance(3)
        cohort.advance()
        cohort.advance()
        cohort.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "cohort [1]" in shown
    assert "2/2" in shown
    assert "slides/s" in shown or "slides/min" in shown
    last = shown.rsplit("cohort", 1)[1]
    assert "slide\x1b" not in last  # the passing bar is gone


def test_advancing_from_threads_loses_nothing() -> None:
    bar = quiet(Clock()).add("x", total=8000)
    threads = [threading.Thread(target=lambda: [bar.advance() for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.done == 8000


def test_track_gives_every_item_and_closes_on_errors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with quiet(clock) as bars:
        assert list(track("abc", "letters", bars=bars)) == ["a", "b", "c"]
        assert list(track(iter("ab"), "stream", bars=bars, passing=True)) == ["a", "b"]
        items = track("abc", "broken", bars=bars)
        next(items)
        with pytest.raises(KeyError):
            items.throw(KeyError("x"))  # type: ignore[attr-defined]
    assert caplog.messages == ["letters: 3 items in 0 s", "broken: 0 items in 0 s"]


def test_rates_have_digits_that_fit() -> None:
    assert format_rate(1240.4, "tiles") == "1240 tiles/s"
    assert format_rate(3.21, "tiles") == "3.2 tiles/s"
    assert format_rate(0.125, "slides") == "7.5 slides/min"


def train(callback: LogProgress, epochs: int) -> None:
    Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_train_batches=2,
        limit_val_batches=0,
    ).fit(BoringModel())


@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")
def test_training_is_logged_now_and_then_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tasks")
    clock = Clock()

    class Slow(LogProgress):
        def on_train_epoch_start(self, trainer: Trainer, module: BoringModel) -> None:
            clock.now += 6

    train(Slow("fold 2", log_every=10, clock=clock), 3)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("tasks")]
    assert [line.split(";")[0] for line in lines] == [
        "fold 2: epoch 2 of 3, 6 s each",
        "fold 2: epoch 3 of 3, 6 s each",
    ]


def test_the_callback_fits_the_terminal() -> None:
    assert isinstance(training_progress(terminal=True), RichProgressBar)
    assert isinstance(training_progress(terminal=False), LogProgress)
