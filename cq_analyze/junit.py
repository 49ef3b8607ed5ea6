"""A report as JUnit XML, the form in which CI servers show tests.

Owns the mapping: a test case for each layer and each picture, for each gate, and for each finding
that belongs to none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

from cq.core.text import printable
from cq_analyze.report import Finding, Gate, Report


@dataclass(frozen=True, slots=True)
class _Case:
    kind: str
    name: str
    failures: tuple[tuple[str, str], ...]  # type and message
    told: str = ""


def junit(report: Report) -> str:
    """The XML document. A case fails by a finding that counts or by a gate; other findings are in
    its `system-out`."""
    cases = list(_cases(report))
    failing = sum(bool(case.failures) for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failing), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": "cq verify", **counts})
    name = _text(report.checkpoint or "pictures")
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts})
    for case in cases:
        element = ElementTree.SubElement(
            suite, "testcase", {"classname": f"cq.verify.{case.kind}", "name": _text(case.name)}
        )
        for kind, message in case.failures:
            failure = {"type": kind, "message": _text(message)}
            ElementTree.SubElement(element, "failure", failure).text = _text(message)
        if case.told:
            ElementTree.SubElement(element, "system-out").text = _text(case.told)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _cases(report: Report) -> Iterable[_Case]:
    of: dict[str | None, list[Finding]] = {}
    for found in report.findings:
        of.setdefault(found.layer, []).append(found)
    failing = set(report.failing)
    missed: dict[tuple[str, str], list[tuple[Gate, float]]] = {}
    for gate in report.gates:
        for name, value in gate.failures:
            missed.setdefault((gate.of, name), []).append((gate, value))
    if report.checkpoint is not None:
        yield _case("file", "the file as a whole", of.pop(None, []), failing, [])
    for layer in report.layers:
        gates = missed.get(("layers", layer.layer), [])
        yield _case("layer", layer.layer, of.pop(layer.layer, []), failing, gates)
    for picture in report.pictures.pictures if report.pictures is not None else ():
        gates = missed.get(("pictures", picture.name), [])
        yield _case("picture", picture.name, of.pop(picture.name, []), failing, gates)
    for other, rest in of.items():
        kind = "picture" if rest[0].name.startswith("images.") else "tensor"
        yield _case(kind, other or "", rest, failing, [])
    for gate in report.gates:
        told = f"{len(gate.failures)} of {gate.count} {gate.of} do not keep {gate.limit:g}"
        failures = () if gate.holds else ((f"gate.{gate.name}", told),)
        yield _Case("gate", f"{gate.name} {gate.limit:g}", failures)


def _case(
    kind: str,
    name: str,
    found: Iterable[Finding],
    failing: set[Finding],
    gates: Iterable[tuple[Gate, float]],
) -> _Case:
    found = list(found)
    failures = [(f.name, f"{f}; what to do: {f.mend}") for f in found if f in failing]
    failures += [
        (f"gate.{gate.name}", f"{gate.name} is {_value(value)}, the limit {gate.limit:g}")
        for gate, value in gates
    ]
    told = "\n".join(f"{f.name}: {f}" for f in found if f not in failing)
    return _Case(kind, name, tuple(failures), told)


def _value(value: float) -> str:
    if math.isnan(value):
        return "not to be measured"
    return f"{value:.6g}" if math.isfinite(value) else "infinite"


def _text(text: str) -> str:
    """What XML can hold: no control characters but line breaks."""
    return "\n".join(printable(line, 2000) for line in text.split("\n"))
