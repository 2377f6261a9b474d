"""Tests of `--track`: what each tracker receives, and that none can harm a run."""

import importlib.machinery
import sys
from types import ModuleType

import pytest

import train
from errors import BadOption
from run import track
from run.folder import Progress, Run
from tests import toys
from tests.campaign.harness import results
from tests.refusals import refused

TRAIN = "--model base --data sums --out out --device cpu --precision fp32 --rank 2 --max-steps 6 "
TRAIN += "--batch-size 4 --evals-per-epoch 1 --save-every 0 --limit 40"


class Fake(ModuleType):
    """A package with the functions that wandb and Trackio share."""

    def __init__(self, name: str, fails: str = ""):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.fails, self.calls, self.inits, self.rows, self.ended = fails, 0, [], [], 0

    def _call(self, name: str) -> None:
        self.calls += 1
        if self.fails == name:
            raise RuntimeError("no network\nat all")

    def init(self, *, project, **settings):
        self._call("init")
        self.inits.append(settings)

    def log(self, values, step=None):
        self._call("log")
        self.rows.append((step, values))

    def finish(self):
        self._call("finish")
        self.ended += 1


@pytest.fixture
def fake(monkeypatch, request):
    name, fails = getattr(request, "param", ("wandb", ""))
    module = Fake(name, fails)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def logged() -> list[dict]:
    return toys.read_log(Run("out").log_file)


def expected() -> list[tuple[int, dict]]:
    """The log's lines as scalars."""
    return [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in logged()]


@pytest.mark.parametrize("fake", [("wandb", ""), ("trackio", "")], indirect=True)
def test_a_tracker_gets_each_line_of_the_log_and_the_same_run_when_it_resumes(at_home, fake):
    name = fake.__name__
    assert train.main([*TRAIN.split(), "--track", name, "--max-minutes", "1e-9"]) == 75
    assert fake.ended == 1
    assert train.main([*TRAIN.split(), "--track", name]) == 0
    assert fake.rows == expected() and len(fake.rows) == 8 and fake.ended == 2
    first, settings = fake.inits
    assert first | {"config": settings["config"]} == settings
    id = Run("out").id
    assert settings["name"] == f"out-{id}" and settings["resume"] == "allow"
    assert settings.get("id") == (id if name == "wandb" else None)
    assert settings["config"]["rank"] == "2"


@pytest.mark.parametrize(
    "fake, calls",
    [(("wandb", "init"), 1), (("wandb", "log"), 2), (("trackio", "finish"), 10)],
    indirect=["fake"],
)
def test_a_tracker_that_fails_is_reported_once_and_changes_nothing(at_home, fake, calls, capsys):
    assert train.main([*TRAIN.split(), "--out", "plain"]) == 0
    assert train.main([*TRAIN.split(), "--track", fake.__name__]) == 0
    said = capsys.readouterr().out
    assert said.count(f"--track {fake.__name__} failed") == 1
    assert "  RuntimeError: no network" in said
    assert fake.calls == calls
    assert results(at_home / "out") == results(at_home / "plain")


@pytest.mark.parametrize("name", track.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    name, at_home, monkeypatch, capsys
):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    assert "is not installed" in refused(train.main, f"{TRAIN} --track {name}", capsys)
    with pytest.raises(BadOption, match=f"pip install {name}"):
        track.check_tracker(name)


def test_only_finite_numbers_are_sent_and_losses_by_source_have_names_of_their_own():
    line = {"step": 3, "val_loss": 0.5, "bad": float("nan"), "none": None, "skipped_rows": [1],
            "val_loss_by_source": {"gsm8k": 0.25, "a/b.jsonl": float("inf")}}  # fmt: skip
    assert track.scalars(line) == {"val_loss": 0.5, "val_loss_by_source/gsm8k": 0.25}


def test_tensorboard_shows_the_lines_of_the_log_once_also_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, steps = Run(tmp_path), (range(5), range(3, 8))  # saved after step 2, killed after step 4
    for first, progress in enumerate((Progress(), Progress(step=2, log_bytes=-1))):
        log = track.RunLog(run, progress, tracker="tensorboard", enabled=True)
        for step in steps[first]:
            log.write(step=step, train_loss=step / 4 + first)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train_loss")
    truth = [(step, step / 4 + (step > 2)) for step in range(8)]
    assert [(event.step, event.value) for event in events] == truth


def test_tensorboard_hides_the_steps_after_the_one_from_which_a_run_resumes(tmp_path, monkeypatch):
    begun = []
    fake = ModuleType("torch.utils.tensorboard")
    writer = ModuleType("writer")
    writer.close = bool
    fake.SummaryWriter = lambda folder, purge_step: begun.append(purge_step) or writer
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for progress in (Progress(), Progress(step=5, log_bytes=100)):
        track.start("tensorboard", Run(tmp_path), progress)
    assert begun == [0, 6]


def test_a_rank_that_does_not_log_starts_no_tracker(tmp_path, fake):
    log = track.RunLog(Run(tmp_path), Progress(), tracker="wandb", enabled=False)
    log.write(step=0, train_loss=1.0)
    log.close()
    assert fake.calls == 0 and list(tmp_path.iterdir()) == []
