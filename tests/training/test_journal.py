from hf_rsheat.training.data import Skipped
from hf_rsheat.training.journal import Journal, read_lines


def test_lines_after_the_resumed_step_and_half_written_lines_are_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    journal = Journal(tmp_path, step=3)
    journal.write([{"step": 4, "loss": 2.0}])
    assert [(line["step"], line["loss"]) for line in read_lines(log)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_an_unusable_image_is_listed_once_also_after_a_restart(tmp_path):
    journal = Journal(tmp_path, step=0)
    assert len(journal.skip([Skipped("a", "empty"), Skipped("a", "empty"), Skipped("b", "cut")])) == 2
    again = Journal(tmp_path, step=0)
    assert again.skip([Skipped("a", "empty")]) == []
    assert read_lines(tmp_path / "skipped.jsonl") == [
        {"path": "a", "reason": "empty"},
        {"path": "b", "reason": "cut"},
    ]
