"""RunFolder: atomic files, logs that are cut back, checkpoints that survive a kill."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from importlib.metadata import version

import pytest
import torch

from gradientless.errors import UserError
from gradientless.run.runfolder import BEST, RunFolder, free_name, newest_of_name, short_name
from gradientless.run.sealed import sealed_toml, write_json
from gradientless.writing import replacing, write_atomically


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path, said) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "steps = 1\n", say=said.append)


class TestOpening:
    def test_a_new_folder_holds_its_configuration(self, folder):
        assert folder.config.read_text() == sealed_toml("steps = 1\n") and folder.holds_run()
        assert RunFolder.open(folder.path).path == folder.path

    def test_a_folder_with_a_run_is_refused_unless_resumed(self, folder):
        with pytest.raises(UserError, match="which holds a run; --resume continues it"):
            RunFolder.create(folder.path, "steps = 2\n")
        assert RunFolder.create(folder.path, "steps = 2\n", resume=True).config.read_text() == sealed_toml(
            "steps = 1\n"
        )

    def test_a_folder_with_other_files_is_refused(self, tmp_path):
        (tmp_path / "thesis.pdf").touch()
        for resume in (False, True):
            with pytest.raises(UserError, match=r"which holds 'thesis\.pdf'"):
                RunFolder.create(tmp_path, "", resume=resume)

    def test_leftovers_of_a_kill_do_not_stand_in_the_way(self, tmp_path):
        (tmp_path / ".config.toml.partial").touch()
        assert RunFolder.create(tmp_path, "a = 1\n").holds_run()

    def test_unwritable(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"^out: must be a folder that can be written, got '.*file/run'"):
            RunFolder.create(tmp_path / "file" / "run", "")

    def test_no_run(self, tmp_path):
        with pytest.raises(UserError, match="folder not found"):
            RunFolder.open(tmp_path / "none")
        with pytest.raises(UserError, match="must be a run folder"):
            RunFolder.open(tmp_path)

    def test_withdrawn_before_anything_was_measured(self, folder):
        folder.write_environment("cpu")
        folder.withdraw()
        assert not folder.path.exists()

    def test_not_withdrawn_once_something_was_measured(self, folder):
        folder.append_metrics({"step": 1})
        folder.withdraw()
        assert folder.holds_run()

    def test_names(self, tmp_path):
        place = tmp_path / "x"
        assert free_name(place) == newest_of_name(place) == place
        place.mkdir()
        assert free_name(place) == tmp_path / "x-2" and newest_of_name(place) == place
        (tmp_path / "x-2").mkdir()
        assert free_name(place) == tmp_path / "x-3" and newest_of_name(place) == tmp_path / "x-2"


class TestFiles:
    def test_a_file_is_whole_or_as_it_was(self, tmp_path, monkeypatch):
        file = tmp_path / "f.json"
        write_json(file, {"a": float("nan"), "b": [1.5, float("inf")]})
        assert json.loads(file.read_text()) == {"a": None, "b": [1.5, None]}
        before = file.read_bytes()
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            write_atomically(file, b"new")
        assert file.read_bytes() == before

    def test_a_folder_is_replaced_whole(self, folder):
        for content in ("one", "two"):
            with replacing(folder.model) as place:
                (place / "file").write_text(content)
        assert (folder.model / "file").read_text() == "two"
        with pytest.raises(RuntimeError), replacing(folder.model) as place:
            (place / "file").write_text("three")
            raise RuntimeError
        assert (folder.model / "file").read_text() == "two"
        assert sorted(p.name for p in folder.path.iterdir()) == ["config.toml", "model"]

    def test_environment_names_no_host_user_or_path(self, folder):
        folder.write_environment("cpu")
        record = json.loads(folder.environment.read_text())
        assert record["versions"]["torch"] == version("torch") and record["threads"] == torch.get_num_threads()
        assert record["cores"] == os.cpu_count() and record["device"] == "cpu"
        text = folder.environment.read_text()
        assert os.uname().nodename not in text and str(folder.path) not in text

    def test_summary(self, folder):
        with pytest.raises(UserError, match="must have ended"):
            folder.read_summary()
        summary = {"metrics": {"accuracy": 0.5, "loss": None}, "steps": 3, "forward_passes": 6, "model_step": 3}
        summary |= {"seconds": 1.5, "peak_memory_mib": 2}
        folder.write_summary(summary)
        assert folder.read_summary() == summary
        folder.write_summary({**summary, "steps": "3"})
        with pytest.raises(UserError, match="steps must be a whole number >= 0, got '3'"):
            folder.read_summary()
        folder.summary.write_text("{")
        with pytest.raises(UserError, match="corrupted"):
            folder.read_summary()


class TestLogs:
    def test_cut_back_and_written_again_the_bytes_are_equal(self, folder, said):
        records = [{"step": i, "split": "train", "loss": 0.1 + i / 3, "f1": float("nan")} for i in range(5)]
        for record in records:
            folder.append_metrics(record)
        straight = folder.metrics.read_bytes()
        with open(folder.metrics, "ab") as file:
            file.write(b'{"step": 5, "lo')
        folder.truncate_logs(2)
        assert [record["step"] for record in folder.read_metrics()] == [0, 1, 2]
        assert said == ["metrics.jsonl: the last line was torn and is left out (line 6)"]
        for record in records[3:]:
            folder.append_metrics(record)
        assert folder.metrics.read_bytes() == straight

    def test_a_damaged_line_in_the_middle_is_an_error(self, folder):
        folder.metrics.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl must hold one JSON object a line, got line 2"):
            folder.read_metrics()

    def test_a_record_needs_its_step(self, folder):
        with pytest.raises(ValueError, match="must have 'step'"):
            folder.append_timings({"seconds": 1.0})


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1], dtype=torch.int64)}


class TestCheckpoints:
    def test_none_yet(self, folder):
        assert folder.load_checkpoint() is None

    def test_round_trip_keeps_the_newest_alone(self, folder):
        for step in (5, 10):
            folder.save_checkpoint(TENSORS, {"rng": [1, 2], "step": step}, step)
        folder.save_checkpoint(TENSORS, {}, 5, BEST)
        tensors, state, step = folder.load_checkpoint()
        assert (state, step) == ({"rng": [1, 2], "step": 10}, 10)
        assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
        assert folder.load_checkpoint(BEST)[2] == 5
        assert sorted(p.name for p in folder.path.iterdir()) == ["best-5", "checkpoint-10", "config.toml"]

    def test_tensors_are_read_one_by_one_and_not_kept(self, folder):
        folder.save_checkpoint(TENSORS, {}, 1)
        tensors, _, _ = folder.load_checkpoint()
        seen = weakref.ref(tensors["a"])
        gc.collect()
        assert seen() is None and len(tensors) == 2 and "c" not in tensors

    def test_tensors_that_share_memory_or_are_not_contiguous(self, folder):
        folder.save_checkpoint({"x": TENSORS["a"], "y": TENSORS["a"], "t": TENSORS["a"].t()}, {}, 1)
        tensors, _, _ = folder.load_checkpoint()
        assert torch.equal(tensors["y"], TENSORS["a"]) and torch.equal(tensors["t"], TENSORS["a"].t())

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda place: (place / "state.json").write_text("{"), "state.json must be JSON"),
            (lambda place: (place / "state.json").write_text("[]"), "it must be an object"),
            (lambda place: (place / "state.json").unlink(), "file not found, got .*state.json"),
            (lambda place: (place / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
            (lambda place: (place / "tensors.safetensors").write_bytes(b"junk"), "does not match its checksum"),
        ],
    )
    def test_corrupted(self, folder, said, damage, reason):
        newest = folder.save_checkpoint(TENSORS, {}, 20)
        damage(newest)
        with pytest.raises(UserError, match=rf"checkpoint .*checkpoint-20: corrupted \(.*{reason}"):
            folder.load_checkpoint()
        whole = RunFolder.create(folder.path / "other", "").save_checkpoint(TENSORS, {}, 10)
        os.rename(whole, folder.path / "checkpoint-10")
        assert folder.load_checkpoint()[2] == 10
        assert len(said) == 1 and "corrupted" in said[0] and said[0].endswith("continuing from checkpoint-10")

    def test_killed_between_the_two_renames(self, folder):
        """A checkpoint that is written again stays readable under its other name until the new one stands."""
        place = folder.save_checkpoint(TENSORS, {"try": 1}, 7)
        os.rename(place, place.with_name("checkpoint-7-superseded"))
        assert folder.load_checkpoint()[1] == {"try": 1}
        folder.save_checkpoint(TENSORS, {"try": 2}, 7)
        assert folder.load_checkpoint()[1] == {"try": 2}
        assert sorted(p.name for p in folder.path.iterdir()) == ["checkpoint-7", "config.toml"]

    def test_killed_while_writing(self, folder):
        folder.save_checkpoint(TENSORS, {}, 7)
        partial = folder.path / ".checkpoint-9.partial"
        shutil.copytree(folder.path / "checkpoint-7", partial)
        (partial / "tensors.safetensors").write_bytes(b"")
        assert folder.load_checkpoint()[2] == 7
        folder.sweep()
        assert not partial.exists()


def test_events_of_later_steps_are_purged(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resumed_at in ((range(1, 6), None), (range(4, 7), 3)):
        writer = folder.events(resumed_at)
        for step in steps:
            writer.add_scalar("loss", step + (0.5 if resumed_at else 0), step)
    read = EventAccumulator(str(folder.tensorboard))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5)]


def test_a_long_name_is_shortened_with_a_checksum():
    assert short_name("sst2-gld-seed42") == "sst2-gld-seed42"
    one, other = short_name("ä" * 300 + "-seed1"), short_name("ä" * 300 + "-seed2")
    assert one != other and len(one.encode()) <= 120 and one.startswith("ää")
