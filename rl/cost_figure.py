"""The cost of sparse attention as one SVG for the docs: python -m winnow.rl.cost_figure OUT.svg COST.json [COST.json ...]

Each COST.json is what `winnow bench cost --out` wrote. Beside them stand the ratios that DeepSeek published for V3.2-Exp on H800.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.rl.charts import HEIGHT, WIDTH, Series, line_chart

# context in K tokens -> cost of dense over sparse, read off the curves of the DeepSeek-V3.2-Exp report
PUBLISHED = {
    "prefill": {8: 0.90, 16: 1.21, 32: 1.74, 64: 2.55, 128: 3.56},
    "decode": {2: 0.71, 8: 1.33, 16: 2.11, 32: 3.47, 64: 5.66, 128: 8.64},
}
STYLE = """
  svg { --ink: #22252b; --soft: #6a6f7a; --line: #d9d6ce; --c0: #2f6fb3; --c1: #c4572b; --c2: #3b8f5a; --c3: #8a5bb5; --c4: #b38a1d;
        --c5: #3a9aa0; font: 12px ui-sans-serif, system-ui, sans-serif; fill: var(--ink); }
  .tick { fill: var(--soft); font-size: 10.5px; }
  @media (prefers-color-scheme: dark) { svg { --ink: #e6e7ea; --soft: #9aa0ab; --line: #444950; } }
"""
GAP, HEAD = 30, 24


def ratios(curves: Mapping[str, Any], kind: str) -> Series:
    """Dense over sparse by K tokens, of one measurement."""
    pairs = zip(curves[kind]["dense"], curves[kind]["sparse"], strict=True)
    return Series(
        str(curves["shape"]), [n / 1024 for n in curves["lengths"]], [dense / sparse for dense, sparse in pairs]
    )


def cost_figure(measured: Sequence[Mapping[str, Any]]) -> str:
    """A whole SVG document: prefill and decode side by side."""
    parts = []
    for number, kind in enumerate(("prefill", "decode")):
        published = Series("published", list(PUBLISHED[kind]), list(PUBLISHED[kind].values()))
        chart = line_chart([*(ratios(curves, kind) for curves in measured), published], label=kind)
        inner = re.sub(r"^<svg[^>]*>|</svg>$", "", chart)
        at = number * (WIDTH + GAP)
        title = f"{kind}: cost of dense over sparse, by context (K tokens)"
        parts.append(
            f'<g transform="translate({at} 0)"><text x="8" y="14">{title}</text><g transform="translate(0 {HEAD})">{inner}</g></g>'
        )
    size = f"0 0 {2 * WIDTH + GAP} {HEIGHT + HEAD}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img"><style>{STYLE}</style>{"".join(parts)}</svg>\n'


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    Path(arguments[0]).write_text(cost_figure([json.loads(Path(name).read_text()) for name in arguments[1:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
