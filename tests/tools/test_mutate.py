"""The mutation tool: which faults exist, how they are sampled, and their results; and the supervision of processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tools import mutate
from tools.mutants import Mutant, find_mutants

CHECKOUT = Path(__file__).parents[2]

SOURCE = b'''
"""Text."""
LIMIT: int = 5

class Guard:
    count: int = 0

    def check(self, size: int, *, strict: bool = True) -> bool | None:
        """Text."""
        log.debug("size %d", size)
        if size > LIMIT or not self.ready:
            raise ValueError(f"{size} < {LIMIT}")
        if strict:
            self.count += 1
            self.last[size] = min(size, 7)
            return True
        self.tell("x" + "y", 3)
        return None
'''


def faults(source: bytes) -> list[tuple[int, str]]:
    """Return the line of each fault, and the line's text with it."""
    return [(one.line, one.after) for one in find_mutants("m.py", source)]


def test_kinds_of_faults() -> None:
    """Faults are in comparisons, conditions, bounds and statements, not in texts, annotations and arguments."""
    assert faults(SOURCE) == [
        (3, "LIMIT: int = (5 + 1)"),
        (6, "count: int = (0 + 1)"),
        (8, "def check(self, size: int, *, strict: bool = False) -> bool | None:"),
        (11, "if size <= LIMIT or not self.ready:"),
        (11, "if size >= LIMIT or not self.ready:"),
        (11, "if size > LIMIT and not self.ready:"),
        (11, "if size > LIMIT or  self.ready:"),
        (12, "pass"),
        (13, "if (not (strict)):"),
        (14, "pass"),
        (14, "self.count -= 1"),
        (14, "self.count += (1 + 1)"),
        (15, "pass"),
        (15, "self.last[size] = max(size, 7)"),
        (15, "self.last[size] = min(size, (7 + 1))"),
        (16, "pass"),
        (16, "return False"),
        (17, "pass"),
    ]


def test_faults_of_every_module_can_be_compiled() -> None:
    """A module with a fault differs from the original, and can be parsed; tested with a part of all faults."""
    for path in sorted((CHECKOUT / "guestapi").rglob("*.py")):
        source = path.read_bytes()
        for one in find_mutants(str(path), source)[::9]:
            faulty = one.apply(source)
            assert faulty != source
            ast.parse(faulty)


def test_sample_depends_on_its_seed() -> None:
    """The same seed gives the same sample, another seed another one; a size above the number of faults gives all."""
    found = find_mutants("m.py", SOURCE)
    assert mutate.choose(found, 1, 5) == mutate.choose(found, 1, 5)
    assert mutate.choose(found, 1, 5) != mutate.choose(found, 2, 5)
    assert len(set(mutate.choose(found, 1, 5))) == 5
    assert mutate.choose(found, 1, 100) == found


def plan(tmp_path: Path, equivalent: str) -> mutate.MutationPlan:
    """Return a plan with one existing module and these entries."""
    (tmp_path / "m.py").write_bytes(SOURCE)
    (tmp_path / "modules.toml").write_text('[modules]\n"m.py" = ["m.py"]\n')
    (tmp_path / "equivalent.toml").write_text(equivalent)
    return mutate.load_plan(tmp_path / "modules.toml", tmp_path / "equivalent.toml", tmp_path)


ENTRY = '[[equivalent]]\nmodule = "m.py"\nscope = "Guard.check"\nbefore = "return True"\nafter = "return False"\n'


def result(by: str, after: str = "return False") -> mutate.MutationResult:
    """Return the result of a fault."""
    (fault,) = (one for one in find_mutants("m.py", SOURCE) if (one.before, one.after) == ("return True", after))
    return mutate.MutationResult(fault, by, 1.0)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Survivors are named with file and line; equivalent faults do not count, but may be only 5 % of a sample."""
    unexplained = plan(tmp_path, "")
    assert mutate.report([result("t"), result("")], unexplained, 50.0) == 0
    assert mutate.report([result("t"), result("")], unexplained, 51.0) == 1
    assert "m.py:16: survives: return True  ->  return False" in capsys.readouterr().out
    explained = plan(tmp_path, ENTRY + 'why = "nobody looks"\n')
    assert mutate.report([result("t")] * 19 + [result("")], explained, 100.0) == 0
    assert "20 faults, 1 equivalent, 0 survive: 100.0 % killed" in capsys.readouterr().out
    assert mutate.report([result("t")] * 18 + [result("")], explained, 100.0) == 1
    assert "more than 5% of the sample" in capsys.readouterr().out


def test_invalid_plan(tmp_path: Path) -> None:
    """An entry without a reason, and a missing module or test, are refused."""
    with pytest.raises(SystemExit, match="has no reason"):
        plan(tmp_path, ENTRY)
    (tmp_path / "modules.toml").write_text('[modules]\n"m.py" = ["gone.py"]\n')
    with pytest.raises(SystemExit, match=r"names what is not there: gone\.py"):
        mutate.load_plan(tmp_path / "modules.toml", tmp_path / "equivalent.toml", tmp_path)


def test_plan_of_the_checkout() -> None:
    """Every module and test in the checkout's plan exists, and every equivalent fault can be made."""
    found = mutate.load_plan()
    known = {one.key for path in found.tests for one in find_mutants(path, (CHECKOUT / path).read_bytes())}
    assert [key for key in found.equivalent if key not in known] == []


def test_notes_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed fault stays recorded until its module changes, a survivor until one of its tests does, too."""
    monkeypatch.setattr(mutate, "CHECKOUT", tmp_path)
    made = plan(tmp_path, "")
    made.tests["m.py"] = ("t.py",)
    (tmp_path / "t.py").write_text("")
    killed, survived = result("t.py"), result("", "pass")
    notes = mutate.Notes(tmp_path / "found", made)
    assert notes.find(killed.mutant) is None
    notes.add(killed)
    notes.add(survived)

    def found(one: mutate.MutationResult) -> mutate.MutationResult | None:
        return mutate.Notes(tmp_path / "found", made).find(one.mutant)

    assert (found(killed), found(survived)) == (killed, survived)
    (tmp_path / "t.py").write_text("# changed")
    assert (found(killed), found(survived)) == (killed, None)
    (tmp_path / "m.py").write_bytes(SOURCE + b"# changed")
    assert (found(killed), found(survived)) == (None, None)


def supervise(seconds: float, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script under supervision."""
    command = [sys.executable, str(CHECKOUT / "tools/supervise.py"), str(seconds), "sh", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_left_processes_are_killed() -> None:
    """The exit code is the command's; a daemon that it has left behind is killed, in any session."""
    done = supervise(60, "setsid sleep 1000 >/dev/null 2>&1 & echo $!; exit 3")
    assert done.returncode == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_timeout_kills_all_processes() -> None:
    """After its time a command is killed with all its processes, and the exit code shows it."""
    began = time.monotonic()
    done = supervise(0.2, "sleep 1000 & echo $!; sleep 1000")
    assert done.returncode == 124
    assert time.monotonic() - began < 500
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.root
def test_fault_is_mounted_for_its_tests_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault is killed by a test that depends on it, and survives another one; the module itself stays unchanged."""
    monkeypatch.setattr(mutate, "CHECKOUT", tmp_path)
    made = plan(tmp_path, "")
    (tmp_path / "test_it.py").write_text("def test_it():\n    import m\n    assert m.LIMIT == 5\n")
    (tmp_path / "test_none.py").write_text("def test_none():\n    pass\n")
    limit: Mutant = find_mutants("m.py", SOURCE)[0]
    for tests, by in ((["test_none.py", "test_it.py"], "test_it.py"), (["test_none.py"], "")):
        made.tests["m.py"] = tuple(tests)
        runner = mutate.Runner(made, tmp_path)
        runner.baseline(tests)
        assert runner.judge(limit).by == by
    assert (tmp_path / "m.py").read_bytes() == SOURCE


@pytest.mark.root
def test_fault_that_hangs_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault counts as killed if its tests take too long, and is listed, because a busy machine is slow, too."""
    monkeypatch.setattr(mutate, "CHECKOUT", tmp_path)
    monkeypatch.setattr(mutate, "LEAST_SECONDS", 1.0)
    made = plan(tmp_path, "")
    (tmp_path / "test_it.py").write_text("def test_it():\n    import m\n    while m.LIMIT != 5:\n        pass\n")
    made.tests["m.py"] = ("test_it.py",)
    runner = mutate.Runner(made, tmp_path)
    runner.baseline(["test_it.py"])
    found = runner.judge(find_mutants("m.py", SOURCE)[0])
    assert (found.by, found.timed_out) == ("test_it.py", True)
    notes = mutate.Notes(tmp_path / "found.jsonl", made)
    notes.add(found)
    assert mutate.Notes(tmp_path / "found.jsonl", made).find(found.mutant) == replace(
        found, seconds=round(found.seconds, 2)
    )
    assert mutate.report([found], made, 100.0) == 0
    assert "m.py:3: killed by its timeout: LIMIT: int = 5  ->  LIMIT: int = (5 + 1)" in capsys.readouterr().out
