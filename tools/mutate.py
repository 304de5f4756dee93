"""Finds guards that can be removed without a failing test: a sample of small faults, and the tests nearest to each.

    make mutate
    make mutate MUTATE='--seed 7 --sample 500'
    make mutate MUTATE='--sample 60 guestapi/callers/identify.py'

Each fault of the sample (tools/mutants.py lists the kinds) is put into its module, one after another, and the tests
that tools/mutate.toml names for the module run, the nearest first, until one fails. A fault without a failing test is a
survivor. It needs a test or, if no input can distinguish it from the original, an entry with the reason in
tools/mutate-equivalent.toml; at most 5 % of a sample may be such faults.

The checkout itself stays unchanged: the faulty module is mounted over the original one, only for the tests. Results are
kept in .mutate/; after an interruption the next run continues. Needs root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.mutants import Mutant, find_mutants

CHECKOUT = Path(__file__).resolve().parents[1]
MODULES = CHECKOUT / "tools" / "mutate.toml"
EQUIVALENT = CHECKOUT / "tools" / "mutate-equivalent.toml"
STATE = CHECKOUT / ".mutate"
SUPERVISE = CHECKOUT / "tools" / "supervise.py"

#: The permitted share of equivalent faults in a sample; more would mean that the kinds of faults are badly chosen.
MOST_EQUIVALENT = 0.05
#: The timeout of tests: at least so many seconds, and so many times as long as without a fault, which may delay them.
LEAST_SECONDS, TIMES = 60.0, 5.0


@dataclass(frozen=True, slots=True)
class MutationPlan:
    """The modules for faults, and their tests.

    Attributes:
        tests: for each module, from the root of the checkout, the paths of its tests, the nearest first.
        equivalent: faults that no input can distinguish from the original, with the reason.
    """

    tests: dict[str, tuple[str, ...]]
    equivalent: dict[tuple[str, str, str, str], str]


@dataclass(frozen=True, slots=True)
class MutationResult:
    """The result of a fault: the tests that killed it, or a survivor (`by` is empty).

    Attributes:
        mutant: the fault.
        by: the tests that killed it.
        seconds: how long its tests took.
        timed_out: they took too long, because the fault makes them hang or because the machine was busy.
    """

    mutant: Mutant
    by: str
    seconds: float
    timed_out: bool = False


def load_plan(modules: Path = MODULES, equivalent: Path = EQUIVALENT, checkout: Path = CHECKOUT) -> MutationPlan:
    """Read the two files.

    Raises:
        SystemExit: a file that they name does not exist, or an entry has no reason.
    """
    tests = {module: tuple(files) for module, files in tomllib.loads(modules.read_text())["modules"].items()}
    missing = [name for files in (tests, *tests.values()) for name in files if not (checkout / name).exists()]
    if missing:
        sys.exit(f"{modules.name} names what is not there: {', '.join(sorted(set(missing)))}")
    known = {}
    for entry in tomllib.loads(equivalent.read_text()).get("equivalent", []):
        if not entry.get("why"):
            sys.exit(f"{equivalent.name}: {entry.get('module')}: {entry.get('before')!r} has no reason")
        known[entry["module"], entry["scope"], entry["before"], entry["after"]] = entry["why"]
    return MutationPlan(tests, known)


def choose(mutants: Sequence[Mutant], seed: int, size: int) -> list[Mutant]:
    """Return a sample, the same for the same seed and modules; all of them if there are fewer."""
    if len(mutants) <= size:
        return list(mutants)
    return random.Random(seed).sample(list(mutants), size)


class Runner:
    """Runs tests with and without faults. Tests of one file never run twice at a time."""

    def __init__(self, plan: MutationPlan, state: Path) -> None:
        self._plan = plan
        self._state = state
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._limits: dict[str, float] = {}

    def baseline(self, files: Iterable[str]) -> None:
        """Run tests without a fault, to check that they pass, and to measure their time.

        Raises:
            SystemExit: they fail, so they cannot detect a fault.
        """
        noted = self._state / "baseline.json"
        known: dict[str, list[object]] = json.loads(noted.read_text()) if noted.exists() else {}
        for file in files:
            modules = [module for module, tests in self._plan.tests.items() if file in tests]
            digest = _digest(CHECKOUT / path for path in (file, *modules))
            if known.get(file, [None])[0] != digest:
                began = time.monotonic()
                if code := self._run([file], None, 600.0):
                    sys.exit(f"{file} fails without any fault (pytest's exit code {code}): mend it first")
                known[file] = [digest, time.monotonic() - began]
                noted.write_text(json.dumps(known))
            self._limits[file] = max(LEAST_SECONDS, TIMES * float(str(known[file][1])))

    def judge(self, mutant: Mutant) -> MutationResult:
        """Put a fault into its module, and run its tests until one fails or hangs."""
        began = time.monotonic()
        source = (CHECKOUT / mutant.path).read_bytes()
        for file in self._plan.tests[mutant.path]:
            with self._guard:
                lock = self._locks.setdefault(file, threading.Lock())
            with lock:
                started = time.monotonic()
                code = self._run([file], (mutant.path, mutant.apply(source)), self._limits[file])
            if code:
                now = time.monotonic()
                return MutationResult(mutant, file, now - began, now - started >= round(self._limits[file]))
        return MutationResult(mutant, "", time.monotonic() - began)

    def _run(self, files: list[str], fault: tuple[str, bytes] | None, seconds: float) -> int:
        """Run tests; return the exit code, 0 if all passed."""
        with ExitStack() as stack:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--timeout={seconds:.0f}"]
            command += files
            if fault is not None:
                path, content = fault
                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="guestapi-mutate-", dir="/run"))
                command = [*cover(CHECKOUT / path, content, Path(directory)), *command]
            return _supervised(command, seconds)


def cover(module: Path, content: bytes, directory: Path) -> list[str]:
    """Return a prefix of a command that makes it and its children see another content of a module.

    Args:
        module: the file.
        content: its content for the command.
        directory: a directory for that content.
    """
    directory.chmod(0o755)
    other = directory / module.name
    other.write_bytes(content)
    # Python takes compiled code for current if the source has the same time in whole seconds.
    then = int(hashlib.sha256(content).hexdigest()[:7], 16) + 1
    os.utime(other, (then, then))
    shell = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", shell, "sh", str(other), str(module)]


def _supervised(command: list[str], seconds: float) -> int:
    """Run a command, and kill the processes that it leaves behind; return its exit code."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    supervised = [sys.executable, str(SUPERVISE), f"{seconds:.0f}", *command]
    nowhere = subprocess.DEVNULL
    return subprocess.run(
        supervised, cwd=CHECKOUT, env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False
    ).returncode


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_dir():
            digest.update(_digest(sorted(file.rglob("*.py"))).encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Notes:
    """The results, one JSON document a line, so that an interruption loses none.

    A result belongs to a version of the module; survival depends on its tests, too. So a killed fault stays killed
    while its module is unchanged, and a survivor is tried again after a change of its tests.
    """

    def __init__(self, file: Path, plan: MutationPlan) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._plan = plan
        self._digests: dict[str, tuple[str, str]] = {}
        self._known: dict[str, dict[str, object]] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                note = json.loads(line)
                self._known[note["fault"]] = note

    def find(self, mutant: Mutant) -> MutationResult | None:
        """Return the recorded result of a fault, if it is still valid."""
        note = self._known.get(self._name(mutant))
        if note is None or (not note["by"] and note["tests"] != self._digest(mutant)[1]):
            return None
        return MutationResult(mutant, str(note["by"]), float(str(note["seconds"])), bool(note.get("timed_out")))

    def add(self, result: MutationResult) -> None:
        """Record the result of a fault."""
        note = {
            "fault": self._name(result.mutant),
            "at": f"{result.mutant.path}:{result.mutant.line}",
            "after": result.mutant.after,
            "by": result.by,
            "seconds": round(result.seconds, 2),
            "timed_out": result.timed_out,
            "tests": self._digest(result.mutant)[1],
        }
        with self._lock, self._file.open("a") as file:
            file.write(json.dumps(note) + "\n")

    def _digest(self, mutant: Mutant) -> tuple[str, str]:
        if mutant.path not in self._digests:
            module = _digest([CHECKOUT / mutant.path])
            self._digests[mutant.path] = module, _digest(CHECKOUT / test for test in self._plan.tests[mutant.path])
        return self._digests[mutant.path]

    def _name(self, mutant: Mutant) -> str:
        return f"{mutant.path}@{self._digest(mutant)[0]}:{mutant.start}-{mutant.end}:{mutant.text}"


def report(results: Sequence[MutationResult], plan: MutationPlan, at_least: float) -> int:
    """Print the results; return the exit code, 0 if enough faults were killed."""
    equivalent = [one for one in results if not one.by and one.mutant.key in plan.equivalent]
    survivors = [one for one in results if not one.by and one.mutant.key not in plan.equivalent]
    for fate, found in (("killed by its timeout", [one for one in results if one.timed_out]), ("survives", survivors)):
        for one in sorted(found, key=lambda result: (result.mutant.path, result.mutant.line)):
            print(f"{one.mutant.path}:{one.mutant.line}: {fate}: {one.mutant.before}  ->  {one.mutant.after}")
    counted = len(results) - len(equivalent)
    share = 100.0 * (counted - len(survivors)) / max(1, counted)
    print(f"{len(results)} faults, {len(equivalent)} equivalent, {len(survivors)} survive: {share:.1f} % killed")
    if len(equivalent) > MOST_EQUIVALENT * len(results):
        print(f"more than {MOST_EQUIVALENT:.0%} of the sample are equivalent to the original")
        return 1
    return int(share < at_least)


def changed_since(revision: str) -> set[str]:
    """Return the files of the checkout that differ from those of a revision."""
    command = ["git", "-C", str(CHECKOUT), "diff", "--name-only", revision]
    return set(subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules, or beginnings of their paths; default: all of mutate.toml")
    parser.add_argument("--seed", type=int, default=1, help="another one is another sample (1)")
    parser.add_argument("--sample", type=int, default=500, help="how many faults (500)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--at-least", type=float, default=97.0, help="how many percent must be killed (97)")
    parser.add_argument("--changed", metavar="REVISION", help="of modules that differ from this revision alone")
    parser.add_argument("--list", action="store_true", help="show the sample, run nothing")
    options = parser.parse_args(arguments)
    plan = load_plan()
    paths = [path for path in plan.tests if not options.modules or path.startswith(tuple(options.modules))]
    if options.changed:
        changed = changed_since(options.changed)
        paths = [path for path in paths if path in changed]
        if not paths:
            print(f"no module of {MODULES.name} differs from {options.changed}")
            return 0
    if not paths:
        sys.exit(f"no module of {MODULES.name} begins with {' or '.join(options.modules)}")
    mutants = [one for path in paths for one in find_mutants(path, (CHECKOUT / path).read_bytes())]
    sample = choose(mutants, options.seed, options.sample)
    if options.list:
        for one in sample:
            print(f"{one.path}:{one.line}: {one.before}  ->  {one.after}")
        return 0
    if os.geteuid() != 0:
        sys.exit("run this as root: a faulty module is mounted over the original one")
    return _work(plan, sample, options.jobs, options.at_least)


def _work(plan: MutationPlan, sample: list[Mutant], jobs: int, at_least: float) -> int:
    STATE.mkdir(exist_ok=True)
    notes = Notes(STATE / "found.jsonl", plan)
    results = [found for one in sample if (found := notes.find(one)) is not None]
    done = {id(one.mutant) for one in results}
    left = [one for one in sample if id(one) not in done]
    if results:
        print(f"{len(results)} of {len(sample)} are known from before")
    runner = Runner(plan, STATE)
    runner.baseline(dict.fromkeys(test for one in left for test in plan.tests[one.path]))

    def judge(mutant: Mutant) -> MutationResult:
        result = runner.judge(mutant)
        notes.add(result)
        fate = f"killed by {result.by}" if result.by else "SURVIVES"
        print(f"{mutant.path}:{mutant.line}: {mutant.after}: {fate} ({result.seconds:.1f} s)", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        results += pool.map(judge, left)
    return report(results, plan, at_least)


if __name__ == "__main__":
    sys.exit(main())
