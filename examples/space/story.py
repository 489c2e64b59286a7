"""The parts of an answer in HTML. All text is escaped: labels and file names can hold anything."""

from collections.abc import Sequence
from html import escape
from typing import Any


COLOURS = ("#4f46e5", "#d97706", "#059669", "#db2777", "#0284c7", "#7c3aed", "#65a30d", "#dc2626")
MOST_NAMED = 8  # labels in a legend

CSS = """
.gradio-container .html-container { padding: 0 !important; }
.message { border-left: 4px solid var(--color-accent); border-radius: 4px; background: var(--block-background-fill); }
.message { padding: 10px 14px; overflow-wrap: anywhere; }
.message.error { border-color: #dc2626; background: #dc262618; }
#video { height: 280px !important; }
#video video { max-height: 220px; }
#inputs .gallery:not(.container) { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
#inputs .gallery .container, #inputs .gallery video { width: 100%; height: 64px; max-width: none; object-fit: cover; }
#method .wrap { flex-wrap: wrap; }
.story { overflow-wrap: anywhere; }
.story h3 { margin: 14px 0 6px; }
.story .answer { font-size: 26px; font-weight: 600; line-height: 1.25; margin-bottom: 8px; }
.story .group { font-size: 13px; opacity: 0.7; margin-top: 8px; }
.story .row { display: grid; grid-template-columns: minmax(0, 2fr) minmax(60px, 3fr) minmax(3em, auto); }
.story .row { align-items: center; gap: 2px 10px; padding: 3px 0; }
.story .row.other { opacity: 0.65; }
.story .bar { position: relative; height: 10px; border-radius: 5px; background: var(--border-color-primary); }
.story .bar b { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--color-accent); }
.story .bar i { position: absolute; top: -3px; bottom: -3px; width: 2px; background: currentColor; }
.story .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.story .row .number { text-align: right; }
.story ol { margin: 0; padding: 0; list-style: none; }
.story .match { padding: 8px 0; border-bottom: 1px solid var(--border-color-primary); }
.story .match img { display: block; width: 100%; max-width: 480px; margin-top: 6px; border-radius: 4px; }
.story ul { margin: 0; padding-left: 20px; list-style: disc; }
.story li { margin: 3px 0; }
.story .track { position: relative; height: 26px; border-radius: 4px; background: var(--background-fill-secondary); }
.story .track span { position: absolute; top: 0; bottom: 0; border-radius: 4px; box-shadow: inset -1px 0 #fff8; }
.story .ends { display: flex; justify-content: space-between; font-size: 12px; opacity: 0.7; }
.story .names { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin-top: 4px; }
.story .names i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.story .table { max-height: 220px; overflow-y: auto; margin-top: 8px; }
.story table { width: 100%; border: 0 !important; border-collapse: collapse; }
.story th, .story td { padding: 4px 8px 4px 0; text-align: left; }
.story tr, .story tr > * { border: 0 solid var(--border-color-primary) !important; }
.story tr > * { border-bottom-width: 1px !important; }
#overlay img, #sheet img { width: 100%; height: auto; }
@media (max-width: 700px) {
  .gradio-container > .main { padding: 12px 14px !important; }
  .gradio-container .prose h1 { font-size: 22px; margin: 0 0 4px; }
  #video { height: 228px !important; }
  #video video { max-height: 170px; }
  #inputs .gallery .container, #inputs .gallery video { height: 44px; }
  button[role=tab] { padding: 0 7px !important; font-size: 13px !important; }
  #sheet .image-frame { overflow-x: auto; }
  #sheet .image-frame, #sheet .image-frame > * { justify-content: flex-start; }  /* the start can be scrolled to */
  #sheet img { width: 760px; max-width: none; }
}
@media (min-width: 900px) { #inputs { position: sticky; top: 12px; align-self: flex-start; } }
"""


def box(text: str, state: str = "busy") -> str:
    """Return the status box, in the state "busy", "done" or "error"."""
    role = "alert" if state == "error" else "status"
    return f'<div class="message {state}" role="{role}">{escape(text)}</div>'


def what_html(what: dict[str, Any], sure: Sequence[str], heading: str = "What happens") -> str:
    """
    Return the labels of a whole video and how sure they are.

    Args:
        what: "answers" and "rows", see `answers.what`.
        sure: sentences.
    """
    answer = ", ".join(what["answers"]) or "no label reaches its threshold"
    parts, group = [f'<h3>{escape(heading)}</h3><div class="answer">{escape(answer)}</div>'], ""
    for row in what["rows"]:
        if row["group"] != group:
            group = row["group"]
            parts.append(f'<div class="group">{escape(group)}</div>')
        parts.append(_row(row))
    sentences = "".join(f"<li>{escape(one)}</li>" for one in sure)
    return f'<div class="story">{"".join(parts)}<h3>How sure</h3><ul class="sure">{sentences}</ul></div>'


def _row(row: dict[str, Any]) -> str:
    """Return a label with a bar; a mark on the bar is the threshold. Values of a regression have no bar."""
    kind = "row" if row["is_given"] else "row other"
    name = f"<span>{escape(row['label'])}</span>"
    if row["is_value"]:
        return f'<div class="{kind}">{name}<span></span><span class="number">{row["score"]:.4g}</span></div>'
    mark, number = "", row.get("number", f"{row['score']:.0%}")
    if "threshold" in row:
        mark = f'<i style="left:{100 * row["threshold"]:.2f}%"></i>'
        number += f" (from {row['threshold']:.0%})"
    bar = f'<span class="bar"><b style="width:{100 * row["score"]:.2f}%"></b>{mark}</span>'
    return f'<div class="{kind}">{name}{bar}<span class="number">{number}</span></div>'


def when_html(segments: Sequence[tuple[float, float, str, float]], note: str = "") -> str:
    """Return segments, (start, end, label, score) each, as a coloured bar with a legend and as a table."""
    if not segments:
        return ""
    seconds = max(segments[-1][1], 1e-3)
    names = list(dict.fromkeys(label for _, _, label, _ in segments))
    colour = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    parts = "".join(
        f'<span style="left:{100 * start / seconds:.2f}%;width:{100 * (end - start) / seconds:.2f}%;'
        f'background:{colour[label]}" title="{escape(f"{label} {score:.2f}")}"></span>'
        for start, end, label, score in segments
    )
    legend = "".join(
        f'<span><i style="background:{colour[name]}"></i>{escape(name)}</span>' for name in names[:MOST_NAMED]
    )
    rows = "".join(
        f'<tr><td class="number">{start:.2f}</td><td class="number">{end:.2f}</td><td>{escape(label)}</td>'
        f'<td class="number">{score:.0%}</td></tr>'
        for start, end, label, score in segments
    )
    note = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<div class="story"><h3>When</h3>{note}<div class="track">{parts}</div>'
        f'<div class="ends"><span>0 s</span><span>{seconds:.1f} s</span></div><div class="names">{legend}</div>'
        '<div class="table"><table><thead><tr><th>start (s)</th><th>end (s)</th><th>label</th><th>score</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div></div>"
    )


def where_html(caption: str) -> str:
    return f'<div class="story"><h3>Where the model looked</h3>{escape(caption)}</div>'


def verdict_html(text: str) -> str:
    return f'<div class="story"><h3>Do they agree?</h3>{escape(text)}</div>'


def matches_html(matches: Sequence[dict[str, Any]]) -> str:
    """Return the results of a search, see `similar.matches_of`."""
    rows = []
    for one in matches:
        start, end = one["part"]
        where = (
            []
            if start is None and end is None
            else [f"from {start or 0:.1f} s" + ("" if end is None else f" to {end:.1f} s")]
        )
        where += [] if one["time"] is None else [f"most alike at {one['time']:.1f} s"]
        row = {"label": ", ".join([one["name"], *where]), "score": max(0.0, one["score"])}
        row |= {"is_given": True, "is_value": False, "number": f"{one['score']:.3f}"}
        picture = "" if one["picture"] is None else f'<img src="{escape(one["picture"])}" alt="frames of this video">'
        rows.append(f'<li class="match">{_row(row)}{picture}</li>')
    note = "The score is the cosine similarity of the features: 1 for the same video."
    return f'<div class="story"><h3>Most similar videos</h3><ol>{"".join(rows)}</ol><p>{note}</p></div>'
