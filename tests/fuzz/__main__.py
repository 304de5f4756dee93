"""``python -m tests.fuzz SECONDS [TARGET...]``: coverage-guided fuzzing for that time; exit code 1 if it finds a fault.

Needs the extra ``fuzz``. An input that causes a fault is left in the directory that is printed; it belongs into
test_targets.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target
from tests.harness.machine import CHECKOUT

#: Seconds that one input may take, and seconds after the end of its time by which a target hangs.
_LONGEST, _TIMEOUT = 15, 60
_TRIED = re.compile(r"stat::number_of_executed_units: (\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")


def fuzz(name: str, target: Target, seconds: int, directory: Path) -> tuple[int, int, str]:
    """Fuzz one target.

    Args:
        name: the name of the target.
        target: the target.
        seconds: the duration.
        directory: the directory for its findings.

    Returns:
        the number of inputs, the number of covered branches, and the finding, which is empty if there is none.
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
                command, cwd=CHECKOUT, stdout=output, stderr=output, timeout=seconds + _TIMEOUT, check=False
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
    """Fuzz the targets with these names, each for its share of the time; return the exit code."""
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
