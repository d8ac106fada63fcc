"""How checks register themselves, and which finding comes first."""

from __future__ import annotations

from fastgpt.doctor import checks
from fastgpt.doctor import findings as findings_module
from fastgpt.doctor.findings import rank
from tests.doctor.runs import real_report


def test_checks_register_themselves_in_the_order_of_the_documentation(monkeypatch):
    checks.load(begun=True)
    names = [registered.__name__ for registered in findings_module.registered_checks()]
    assert len(names) == len(set(names)) == 41
    assert (names[0], names[-1]) == ("param_count_mismatch", "memory")
    assert names.index("block_size") < names.index("tokens_per_step") < names.index("not_a_number")

    monkeypatch.setattr(findings_module, "REGISTRY", [])
    last, first = (findings_module.check("id", section=n)(lambda: iter(())) for n in (2, 1))
    assert findings_module.registered_checks() == [first, last]


def test_findings_are_ranked_by_severity_then_cost():
    findings = real_report("40m").findings
    order = ["critical", "warning", "info"]
    keys = [(order.index(f.severity), -f.cost) for f in findings]
    assert keys == sorted(keys) and [f.severity for f in rank(findings[::-1])] == [f.severity for f in findings]
