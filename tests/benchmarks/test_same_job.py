"""What is counted of the same job by several projects."""

from __future__ import annotations

import same_job
from same_job import JOBS, error_of, lines_of, run


def test_comments_docstrings_and_empty_lines_are_no_lines(tmp_path):
    (tmp_path / "commands").write_text("# why\nprepare a.toml\ntrain a.toml \\\n    --ranks 2\n\n")
    (tmp_path / "a.py").write_text('"""A run."""\n\nimport os\n\n# a comment\nprint(os.getcwd())  # another\n')
    assert lines_of(tmp_path) == 3 + 2


def test_every_option_and_setting_has_a_line_of_its_own():
    for job in JOBS.iterdir():
        for line in (job / "commands").read_text().splitlines():
            assert line.count(" --") <= 1 or line.startswith("torchrun --nproc-per-node"), line
    assert {job.name for job in JOBS.iterdir()} == {*same_job.PACKAGES, "megatron_lm"}


def test_the_error_is_that_of_a_rank_and_not_of_its_launcher():
    said = "[rank0]: Traceback\n[rank0]: a.b.SomeError: no GPU\ntorch.x.ChildFailedError: \n=====\nFAILED\n"
    assert error_of(said) == "a.b.SomeError: no GPU"
    assert error_of("bash: line 1: torchrun: command not found\n") == "bash: line 1: torchrun: command not found"
    assert error_of("") == "no message"


def test_a_job_begins_with_the_inputs_and_the_number_of_ranks(tmp_path, monkeypatch):
    job = tmp_path / "jobs" / "some"
    job.mkdir(parents=True)
    (job / "commands").write_text("cat text.jsonl tokenizer/a | grep -q both$RANKS$MORE\n")
    monkeypatch.setattr(same_job, "JOBS", tmp_path / "jobs")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "a").write_text("both2x\n")
    (tmp_path / "text.jsonl").write_text("\n")
    assert run("some", tmp_path, 2, {"MORE": "x"}).keys() == {"ranks", "seconds", "cpu_seconds"}
    assert run("some", tmp_path, 1, {"MORE": "x"}) == {"ranks": 1, "error": "no message"}
