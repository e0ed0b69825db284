"""The style sheet of a report: system fonts, light and dark, narrow screens, paper."""

STYLE = """
:root { --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5b6675; --line: #dfe3e8; --accent: #0b62a4;
  --note: #fff6e0; --note-line: #e0a21a; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --ink: #e6eaf0; --soft: #9aa6b5;
  --line: #303844; --accent: #6cb6f0; --note: #33290f; --note-line: #c79022; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; margin: 0; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.9rem; padding-top: 0.4rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0.6rem 0; overflow-wrap: anywhere; }
.subtitle { color: var(--soft); margin: 0.35rem 0 0; }
nav { display: flex; flex-wrap: wrap; gap: 0.4rem 1.1rem; margin-top: 1rem; padding-bottom: 0.9rem;
  border-bottom: 1px solid var(--line); font-size: 0.93rem; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 0.8rem; margin: 1rem 0; }
.key div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem 1rem; }
.key dt { color: var(--soft); font-size: 0.88rem; }
.key dd { margin: 0; font-size: 1.7rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.key dd.small { font-size: 0.82rem; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 0.9rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
caption { text-align: left; color: var(--soft); padding: 0.7rem 0.9rem 0.2rem; font-size: 0.88rem; }
th, td { text-align: left; padding: 0.5rem 0.9rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 0.85rem; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0.9rem 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; width: fit-content; max-width: 100%; }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; background: #ffffff; margin: 0 auto; }
figcaption { padding: 0.55rem 0.9rem; font-size: 0.88rem; color: var(--soft); overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 0.9rem;
  margin: 0.9rem 0; align-items: start; }
.gallery.pairs { grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); max-width: 58rem; }
.gallery figure { margin: 0; width: auto; max-width: 34rem; }
.notes { background: var(--note); border-left: 4px solid var(--note-line); border-radius: 6px; margin: 0.9rem 0;
  padding: 0.6rem 0.9rem; overflow-wrap: anywhere; }
.notes ul { margin: 0; padding-left: 1.1rem; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0.9rem 0; }
summary { cursor: pointer; padding: 0.7rem 0.9rem; font-weight: 600; }
pre { margin: 0; padding: 0.2rem 0.9rem 0.9rem; overflow-x: auto;
  font: 0.83rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media print {
  :root { --page: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb; --accent: #000000;
    --note: #ffffff; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  figure, .key div, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  th, td { white-space: normal; padding: 0.3rem 0.5rem; }
}
"""
