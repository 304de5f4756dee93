"""``python -m tests.fuzz SECONDS [TARGET...]``: coverage-guided fuzzing, so long in all; exit 1 if anything was found.

Needs the extra ``fuzz``. An input that something is wrong with is left in the directory that is named; it belongs
into test_targets.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target
from tests.harness.machine import CHECKOUT

#: Seconds that one input may take, and more than so long after its time is up a target hangs.
_LONGEST, _PATIENCE = 15, 60
_TRIED = re.compile(r"stat::number_of_executed_units: (\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")


def fuzz(name: str, target: Target, seconds: int, directory: Path) -> tuple[int, int, str]:
    """Fuzz one target.

    Args:
        name: of the target.
        target: the target.
        seconds: how long.
        directory: where to leave what is found.

    Returns:
        How many inputs were tried, how much of the code they came to, and what was found, if anything was.
    """
    corpus = directory / name
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = directory / f"{name}.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words if word))
    options = [f"-max_total_time={seconds}", f"-max_len={target.longest}", f"-dict={words}", f"-timeout={_LONGEST}"]
    command = [sys.executable, "-m", "tests.fuzz.coverage", name, str(corpus), *options]
    command += [f"-artifact_prefix={directory}/{name}-", "-print_final_stats=1", "-rss_limit_mb=2048"]
    log = directory / f"{name}.log"
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, cwd=CHECKOUT, stdout=output, stderr=output, timeout=seconds + _PATIENCE, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    said = log.read_text(errors="replace")
    tried = _TRIED.findall(said)
    coverage = _COVERAGE.findall(said)
    found = "" if code == 0 else f"it hangs; see {log}" if code < 0 else f"see {log}\n{said[-3000:]}"
    return int(tried[-1]) if tried else 0, int(coverage[-1]) if coverage else 0, found


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main(seconds: int, names: list[str]) -> int:
    """Fuzz the targets of these names, each for its share of the time; the exit code."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-fuzz-"))
    shares = sum(TARGETS[name].share for name in names)
    failed = 0
    for name in names:
        target = TARGETS[name]
        share = max(1, seconds * target.share // shares)
        tried, coverage, found = fuzz(name, target, share, directory)
        verdict = found or "nothing found"
        sys.stdout.write(f"{name}: {tried} inputs in {share} s, {coverage} branches: {verdict}\n")
        sys.stdout.flush()
        failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:] or list(TARGETS)))
