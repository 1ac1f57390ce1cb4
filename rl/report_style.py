"""The frame of a report: HTML shell and style sheet. No script, no font, no image from anywhere."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf7; --card: #fff; --ink: #22252b; --soft: #6a6f7a; --line: #e7e4dc;
  --c0: #2f6fb3; --c1: #c4572b; --c2: #3b8f5a; --c3: #8a5bb5; --c4: #b38a1d; --c5: #3a9aa0; --heat: 47 111 179; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171b; --card: #1d2025; --ink: #e6e7ea; --soft: #9aa0ab; --line: #31353d;
  --c0: #74aef0; --c1: #f0976c; --c2: #7ccb99; --c3: #bf9be6; --c4: #dfbb5c; --c5: #73c8cd; --heat: 116 174 240; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 ui-sans-serif, system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
header h1 { font-size: 2rem; line-height: 1.15; margin: 0; letter-spacing: -.02em; }
header p { color: var(--soft); margin: .3rem 0 0; }
section { margin-top: 3rem; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 0; }
section > p { max-width: 46rem; margin: .2rem 0 1rem; }
.quiet { color: var(--soft); font-size: .82rem; margin: .1rem 0 .5rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.grid.few { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem; min-width: 0; }
.card.wide { margin-bottom: 1rem; }
svg { width: 100%; height: auto; display: block; font: 12px ui-sans-serif, system-ui, sans-serif; fill: var(--ink); overflow: visible; }
svg .tick { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin-top: .75rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
summary { cursor: pointer; color: var(--soft); margin-top: 1rem; font-size: .9rem; }
.tokens { font: 13px/2 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: .6rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.tok { background: rgb(var(--heat) / calc(var(--w) * .6)); border-radius: 3px; padding: .12em 0; }
.tok.query { outline: 1.5px solid var(--ink); outline-offset: 1px; }
.tok.drawn { font-weight: 700; border-bottom: 2px solid var(--c1); }
.turn { font-size: .87rem; padding: .4rem .6rem; border-left: 3px solid var(--line); margin: .45rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.turn b { display: block; font-size: .72rem; color: var(--soft); font-weight: 600; }
.turn.assistant { border-left-color: var(--c0); }
.turn.tool { border-left-color: var(--c4); }
.parts { margin: .5rem 0 0; font-size: .8rem; color: var(--soft); }
.parts span { margin-right: .8rem; white-space: nowrap; }
"""


def page(title: str, lead: str, body: str) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · winnow</title><style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>\n{body}\n</main></body></html>\n"
    )
