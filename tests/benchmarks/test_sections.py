"""Sections of a check: what is kept of those that hang, end early, or lack a package."""

from __future__ import annotations

import os
import time

import psutil
import pytest
from lib import sections
from lib.section_process import lacks_package
from lib.sections import Result, Section, run_section
from rich.console import Console

GENERATORS = """
import os, subprocess, sys, time
from lib.sections import limit_s

def two(right=True):
    yield {"limit": limit_s(), "right": right}
    yield {"rank": os.environ.get("RANK", "")}

def hangs(child=False):
    yield {"right": True}
    if child:
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)

def fails_on_rank_1():
    yield {"right": True}
    if os.environ["RANK"] == "1":
        print("before")
        raise RuntimeError("a rank is wrong")
    time.sleep(60)

def needs_a_package():
    yield {"right": True}
    import there_is_no_such_package

def lacks_a_part_of_its_own():
    yield {"right": True}
    import longring.no_such_part

def lacks_on_rank_1():
    yield {"right": True}
    if os.environ["RANK"] == "1":
        import there_is_no_such_package
    sys.exit(1)

def yields_nothing():
    return
    yield

def cannot_be_killed():
    yield {"right": True}
    import faulthandler, signal
    faulthandler.disable()
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "generators.py").write_text(GENERATORS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(name: str, seconds: float = 30.0, ranks: int = 1, **arguments) -> Result:
        variables = [{"RANK": str(rank)} for rank in range(ranks)]
        return run_section(Section(name, f"generators:{name}", seconds, arguments), variables, tmp_path / "logs")

    return run


@pytest.mark.full
def test_rows_of_all_processes_are_returned(run):
    result = run("two", ranks=2)
    assert result.rows == [{"limit": 30.0, "right": True}, {"rank": "0"}, {"limit": 30.0, "right": True}, {"rank": "1"}]
    assert result.section["status"] == "done" and result.right
    assert not run("two", right=False).right, "a row that is not right makes its section wrong"
    assert not run("two", right=None).right, "and so does one that could not be checked"
    empty = run("yields_nothing")
    assert empty.section["status"] == "done" and not empty.right


@pytest.mark.full
def test_an_interrupt_ends_the_children_of_a_section(tmp_path, monkeypatch):
    (tmp_path / "generators.py").write_text(GENERATORS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "logs" / "hangs-0.log"

    def interrupt() -> bool:
        if log.read_text().strip():  # the child has begun
            raise KeyboardInterrupt
        return False

    section = Section("hangs", "generators:hangs", 30.0, {"child": True})
    with pytest.raises(KeyboardInterrupt):
        run_section(section, [{"RANK": "0"}], tmp_path / "logs", interrupt)
    child = int(log.read_text().split()[-1])
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        psutil.Process(child).kill()
        pytest.fail("the child survives")


@pytest.mark.full
def test_a_hang_is_cut_off_with_its_rows_stacks_and_children(run, tmp_path):
    result = run("hangs", seconds=2.0, child=True)
    assert result.rows == [{"right": True}]
    assert result.section["status"] == "cut off after 2 s" and not result.right
    log = (tmp_path / "logs" / "hangs-0.log").read_text()
    assert "generators.py" in log and "in hangs" in log, "the stacks say where it hangs"
    child = int(log.split()[0])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the section's child is alive"
        time.sleep(0.01)


@pytest.mark.full
def test_a_rank_that_fails_ends_the_others_and_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sections, "GRACE_S", 0.3)
    result = run("fails_on_rank_1", ranks=2)
    assert result.section["status"] == "failed" and not result.right, "not cut off at the limit of the section"
    assert "RuntimeError: a rank is wrong" in result.section["note"]
    console = Console(width=80, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    sections.show_result(result, tmp_path / "logs", console)
    assert "fails_on_rank_1-1.log" in console.export_text()


@pytest.mark.full
def test_a_missing_package_leaves_a_section_out(run):
    result = run("needs_a_package")
    assert result.section["status"] == "left out" and "there_is_no_such_package" in result.section["note"]
    assert result.right


@pytest.mark.full
def test_a_missing_part_of_a_package_that_is_here_is_an_error(run):
    result = run("lacks_a_part_of_its_own")
    assert result.section["status"] == "failed" and not result.right
    assert lacks_package("there_is_no_such_package.part")
    assert not any(map(lacks_package, ("longring.no_part", "lib.no_part", "rich.no_part", "")))


@pytest.mark.full
def test_a_section_is_left_out_by_all_of_its_processes_or_none(run):
    assert run("lacks_on_rank_1", ranks=2).section["status"] == "failed"


@pytest.mark.full
def test_a_process_that_survives_its_end_is_told_and_not_waited_for(run, monkeypatch):
    """A process in an uninterruptible call of a driver does; here none is sent SIGKILL."""
    left = []
    monkeypatch.setattr(sections, "_kill_group", left.append)
    monkeypatch.setattr(sections, "ABORT_S", 0.1)
    monkeypatch.setattr(sections, "KILLED_S", 0.1)
    result = run("cannot_be_killed", seconds=3.0)
    [process] = left
    process.kill()
    process.wait()
    assert result.section["status"] == "cut off after 3 s" and not result.right
    assert f"processes [{process.pid}] survive SIGKILL" in result.section["note"]


def test_the_last_line_names_what_is_wrong_and_what_was_left_out():
    def result(name: str, status: str = "done", right: bool = True) -> Result:
        return Result([{"right": right}], {"section": name, "status": status})

    assert sections.verdict([result("a"), result("b")]) == "no errors"
    found = [result("a", right=False), result("b", "left out"), result("c", "failed"), result("d")]
    assert sections.verdict(found) == "errors in a, c: see above; left out: b"
    late = Result([{"right": True}, {"note": sections.NO_TIME}], {"section": "e", "status": "done"})
    assert late.right and sections.verdict([result("a"), late]) == "no errors; not whole for lack of time: e"


def test_a_table_has_every_key_and_fits_80_columns():
    rows = [{"grid": "heads=2, " * 9, "ms": 1234.5, "right": False}, {"grid": "kv", "bytes": 10**7, "note": "why"}]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(sections.rows_table(rows))
    text = console.export_text()
    assert all(word in text for word in ("1,234", "10,000,000", "NO", "why"))
    assert max(map(len, text.splitlines())) <= 80
