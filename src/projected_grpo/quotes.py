"""Numbers quoted in prose: ``0.73 <!-- results: STUDY/LABEL/MEASURE -->`` is checked against the stored summaries.

A quote may be rounded as it likes (0.7, 0.73) or be a percentage (73 %). ``numbers`` lists what can be quoted.
"""

import re
from collections.abc import Mapping

import numpy as np

from projected_grpo.analysis import METRICS, Analysis, control_of
from projected_grpo.run_tables import PROBE

QUOTE = re.compile(r"(?:(?P<number>[+-]?\d*\.?\d+)\s*(?P<percent>%?)\s*)?<!-- results: (?P<key>[^>]*?) -->")
FENCE = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)
"""Code, in which a quote is an example."""


def numbers(a: Analysis) -> dict[str, float]:
    """ "study/label/measure" -> mean over seeds. Measures: hack, attempt, solve, peak at the end of training; the same
    with deploy_ or base_, also @mode; n; cut_hack and cut_solve (none's deployed rate − the label's, seed-paired) and
    control_hack (the random control's − the label's). The label "base" has deploy_… of the untrained model.
    """
    out: dict[str, float] = {}
    for label in a.labels.values():
        measures = {m: a.level(label.name, m) for m in METRICS} | {"peak": a.peak(label.name)}
        for metric in METRICS:
            for mode in ("", "@gt_only", *(f"@{m}" for m in label.modes)):
                for kind in ("deploy_", "base_"):
                    measures[f"{kind}{metric}{mode}"] = a.level(label.name, f"{kind}{metric}{mode}")
        out |= {f"{label.name}/{m}": float(np.mean(list(seeds.values()))) for m, seeds in measures.items() if seeds}
        out[f"{label.name}/n"] = float(len(a.level(label.name, "hack")))
        none, control = a.reference(label, "none"), a.reference(label, control_of(label.arm))
        for name, other, metric in (("cut", none, "hack"), ("cut", none, "solve"), ("control", control, "hack")):
            if other and (found := a.compare(other.name, label.name, f"deploy_{metric}")):
                out[f"{label.name}/{name}_{metric}"] = found.t.mean
    for mode in ("", f"@{PROBE}"):
        base = {f"deploy_{m}{mode}": a.base(m, mode[1:] or "all") for m in METRICS}
        out |= {f"base/{m}": float(np.mean(list(seeds.values()))) for m, seeds in base.items() if seeds}
    return {f"{a.summary.name}/{key}": value for key, value in out.items()}


def wrong(text: str, known: Mapping[str, float]) -> list[str]:
    """Quotes of a page that do not hold, a line each; [] when all do. Quotes inside code are examples."""
    out = []
    for quote in QUOTE.finditer(FENCE.sub("", text)):
        key, number = quote["key"], quote["number"]
        if number is None:
            out.append(f"no number stands before the quote of {key}")
        elif key not in known:
            out.append(f"{number} quotes {key}, which no stored summary has")
        else:
            value = known[key] * (100 if quote["percent"] else 1)
            digits = len(number.partition(".")[2])
            if abs(float(number) - value) > 0.5 * 10**-digits + 1e-6:
                out.append(f"{number} quotes {key}, which is {value:.{digits + 1}f}")
    return out
