"""The alert rules and the dashboard: promtool takes them, and every metric that they name is one of ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from guestapi.metrics.exposition import METRICS

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "docs/monitoring"
RULES = MONITORING / "guestapi.rules.yml"


def promtool(*words: str | Path) -> None:
    """Run promtool, which must be content."""
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool of Debian's package prometheus: tools/packages install test")
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def named(text: str) -> set[str]:
    """The metrics that a text names, without what Prometheus makes of them."""
    return {re.sub("_(total|bucket|count|sum)$", "", name) for name in re.findall(r"\bguestapi_\w+", text)}


def test_rules_are_rules(tmp_path: Path) -> None:
    """promtool takes the rules, and they fire when they are to fire."""
    promtool("check", "rules", RULES)
    tests = tmp_path / "rules.yml"
    tests.write_text((Path(__file__).with_name("rules.yml")).read_text().replace("RULES", str(RULES)))
    promtool("test", "rules", tests)


def test_metrics_exist() -> None:
    """Rules and dashboard name no metric that does not exist; the document names all that do."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert named(queries) <= METRICS.keys()
    assert named(RULES.read_text()) <= METRICS.keys()
    document = (ROOT / "docs/monitoring.md").read_text()
    rows = re.findall(r"^\| `(guestapi_\w+?)(?:_total)?` \| (.*?) \| (.*?) \|$", document, re.MULTILINE)
    assert {name: (text, labels) for name, labels, text in rows} == {
        name: (text, ", ".join(f"`{label}`" for label in labels)) for name, (text, labels) in METRICS.items()
    }


@pytest.mark.parametrize("alert", re.findall(r"- alert: (\w+)", RULES.read_text()))
def test_alert_has_a_runbook(alert: str) -> None:
    """Each alert links to a section of its name in docs/operations.md."""
    assert f"runbook_url: docs/operations.md#{alert.lower()}\n" in RULES.read_text()
    assert f"\n### {alert}\n" in (ROOT / "docs/operations.md").read_text()
