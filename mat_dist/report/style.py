"""Style sheets of the page and of its charts, and the rule that keeps scripts and the network out."""

from __future__ import annotations

import base64
import hashlib

# Colours of the peers: blue, orange, green, magenta, brown, cyan, red, grey; contrast with the ground at least 3:1.
_LIGHT = ("#1f6fb5", "#c45a00", "#1f8a4c", "#a8379b", "#7d6608", "#0b7f8c", "#c0392b", "#5f6b76")
_DARK = ("#6db3f2", "#f0a04b", "#5fce8a", "#e08ad6", "#d6bd4f", "#4fc9d6", "#f08a7d", "#aab4bd")
COLOURS = len(_LIGHT)


def _variables(ink: str, dim: str, ground: str, grid: str, colours: tuple[str, ...]) -> str:
    peers = "".join(f"--s{number}:{colour};" for number, colour in enumerate(colours))
    return f"--ink:{ink};--dim:{dim};--ground:{ground};--grid:{grid};{peers}"


_DAY = _variables("#1b2026", "#5a6570", "#ffffff", "#dde2e7", _LIGHT)
_NIGHT = _variables("#e8ebee", "#9aa5b0", "#14181c", "#323a42", _DARK)
_COLOUR_CLASSES = "".join(f".s{number}{{--c:var(--s{number})}}" for number in range(COLOURS))

CHART = f"""
:root{{color-scheme:light dark;{_DAY}}}
@media (prefers-color-scheme:dark){{:root{{{_NIGHT}}}}}
@media print{{:root{{color-scheme:light;{_DAY}}}}}
{_COLOUR_CLASSES}.sx{{--c:var(--ink)}}
svg{{font:12px system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif;fill:var(--ink)}}
svg .title{{font-size:13px;font-weight:600}}
svg .dim{{fill:var(--dim)}}
svg .axis{{font-size:11px;fill:var(--dim);font-variant-numeric:tabular-nums}}
svg .end{{text-anchor:end}}
svg .middle{{text-anchor:middle}}
svg .grid{{stroke:var(--grid);stroke-width:1}}
svg .guide{{stroke:var(--dim);stroke-width:1;stroke-dasharray:3 3}}
svg .line{{stroke:var(--c);fill:none;stroke-width:1.8;stroke-linejoin:round}}
svg .band{{fill:var(--c);fill-opacity:.13}}
svg .dot{{fill:var(--c)}}
svg .ring{{fill:var(--ground);stroke:var(--c);stroke-width:1.8}}
svg .bar{{fill:var(--c)}}
svg .low{{fill:#1b2026}}
svg .high{{fill:#fff}}
"""

PAGE = CHART + """
*{box-sizing:border-box}
body{margin:0;overflow-wrap:break-word;background:var(--ground);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif}
main,header,footer{max-width:76rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.6rem}
h1{font-size:1.65rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .5rem;padding-top:.5rem;border-top:2px solid var(--grid)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{margin:.4rem 0 .7rem;max-width:46rem}
.dim,caption,figcaption{color:var(--dim);font-size:.875rem}
.notice{border-left:4px solid var(--s1);padding:.35rem .8rem;margin:.8rem 0;max-width:46rem;overflow-wrap:anywhere}
nav{font-size:.875rem;margin:.8rem 0;display:flex;flex-wrap:wrap;gap:.35rem 1rem}
a{color:var(--s0)}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.7rem 1.4rem;margin:1rem 0}
dl.facts dt{color:var(--dim);font-size:.8rem}
dl.facts dd{margin:0;overflow-wrap:anywhere;font-size:.95rem}
dl.facts dd.big{font-size:1.5rem;line-height:1.2;font-weight:600;font-variant-numeric:tabular-nums}
dl.facts dd small{display:block;font-size:.78rem;font-weight:400;color:var(--dim);line-height:1.35}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.28rem .7rem .28rem 0;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top;
 white-space:nowrap}
thead th{white-space:normal;vertical-align:bottom;font-weight:600;border-bottom:2px solid var(--dim)}
tbody th{font-weight:500}
.number{text-align:right}
td small,th small{color:var(--dim);font-weight:400;margin-left:.35rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1.2rem 1.6rem;
 align-items:start;margin:.8rem 0}
.pair{display:flex;flex-wrap:wrap;gap:1rem 2.4rem;align-items:flex-start;margin:.8rem 0}
.pair>figure{flex:1 1 19rem;max-width:30rem}
.pair>.scroll{max-width:100%;margin:0}
figure{margin:0;min-width:0}
figure svg{width:100%;height:auto;max-width:32rem;display:block}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1.4rem 1.6rem}
.card{min-width:0;break-inside:avoid}
.card h3{margin-top:0}
.images{display:grid;grid-template-columns:repeat(3,1fr);gap:.5rem}
.images img{width:100%;height:auto;image-rendering:pixelated;border:1px solid var(--grid);display:block}
.card table{font-size:.82rem;width:100%}
.card th,.card td{padding-right:.4rem}
.wrong{color:var(--s6);font-weight:600}
.wrong small{font-weight:400}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--s0);font-size:.9rem}
pre{font-size:.8rem;overflow-x:auto;border:1px solid var(--grid);padding:.7rem;white-space:pre-wrap;
 overflow-wrap:anywhere}
footer{margin-top:3rem;padding-bottom:2rem;color:var(--dim);font-size:.8rem}
@media (max-width:30rem){body{font-size:15px}th,td{padding-right:.5rem}table{font-size:.84rem}
 td.number small{display:block;margin-left:0}}
@media print{body{font-size:10pt}nav{display:none}h2,h2+p{break-after:avoid}
 h2+p,figure,tr,.card{break-inside:avoid}.card figcaption{font-size:7pt}
 .scroll{overflow:visible}.charts{grid-template-columns:repeat(2,1fr)}.cards{grid-template-columns:repeat(3,1fr)}
 details:not([open]){display:none}a{color:inherit;text-decoration:none}}
"""


def policy() -> str:
    """The content security policy: no script, no network; images inside the page; this one style sheet."""
    digest = base64.b64encode(hashlib.sha256(PAGE.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
