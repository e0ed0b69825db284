"""Results as Markdown, for the repository's records."""

from __future__ import annotations

from collections.abc import Sequence

from attention.bench.growth import GROWTH_DIM, GROWTH_SIDES, Growth, cells
from kernels.measure import Result


def markdown(about: dict[str, str], results: Sequence[Result], rows: Sequence[Growth]) -> str:
    """Everything as Markdown: a table for each size, and one of growth."""
    lines = [f"* {name}: {value}" for name, value in about.items()]
    lines += [
        "* softmax ÷, released ÷: softmax attention's, or the released formulation's, time or memory divided by the"
    ]
    lines[-1] += " mixer's; above 1 the mixer is better"
    sizes = list(dict.fromkeys(result.case.partition(" ")[2] for result in results))
    for size in sizes:
        lines += ["", f"### {size}", ""]
        lines += [
            "| mixer | forward | softmax ÷ | released ÷ | forward+backward | softmax ÷ | released ÷ | peak memory |"
        ]
        lines[-1] += " softmax ÷ | released ÷ |"
        lines += ["|---|" + "---:|" * 9]
        for case in dict.fromkeys(r.case for r in results if r.case.partition(" ")[2] == size):
            found = {r.contestant: r for r in results if r.case == case}
            lines.append(_markdown_row(case.partition(" ")[0], found))
    if rows:
        lines += ["", f"### Growth of the forward pass with the tokens N, {GROWTH_DIM} channels, ms", ""]
        lines += [f"| mixer | {' | '.join(f'{s} x {s}' for s in GROWTH_SIDES)} | measured | claimed |"]
        lines += ["|---|" + "---:|" * (len(GROWTH_SIDES) + 1) + "---|"]
        for row in rows:
            *times, slope = cells(row)
            lines.append(f"| {row.mixer} | {' | '.join(times)} | {slope and f'N^{slope}'} | {row.claimed} |")
    return "\n".join(lines) + "\n"


def _markdown_row(name: str, found: dict[str, Result]) -> str:
    ours = found["fovea"]
    if ours.note:
        return f"| {name} | {ours.note} |" + " |" * 8
    plain, released = found["softmax attention"], found.get("released formulation")

    def ratio(other: Result | None, which: str) -> str:
        if other is None or other.note:
            return "" if other is None else "cannot run"
        mine, theirs = getattr(ours, which), getattr(other, which)
        return f"{theirs / mine:.2f}" if mine and theirs else ""

    cells = [f"{(ours.forward or 0) * 1e3:.1f} ms", ratio(plain, "forward"), ratio(released, "forward")]
    cells += [f"{(ours.both or 0) * 1e3:.1f} ms", ratio(plain, "both"), ratio(released, "both")]
    cells += [f"{(ours.memory or 0) / 1e6:.0f} MB", ratio(plain, "memory"), ratio(released, "memory")]
    return f"| {name} | {' | '.join(cells)} |"
