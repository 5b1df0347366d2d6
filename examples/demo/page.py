"""The report as one HTML file, its pictures inside."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from pictures import NORM, SCORES, veiled
from PIL import Image
from words import Caption

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2530; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid #e3e7ec } th { font-weight: 600 }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto } small, .note { color: #66707c; font-size: .9rem }
.caption { display: flex; gap: 1.1rem; align-items: center; margin: .9rem 0 }
.caption img { width: 96px; height: 96px; image-rendering: pixelated; border: 1px solid #d5dbe2 }
.caption p { margin: 0; line-height: 1.9 } .caption i { color: #8a94a0; margin-right: .5rem }
.caption span { padding: .1rem .12rem } s { text-decoration: line-through #c1272d 2px } b { font-weight: 700 }
"""


def write_page(
    file: Path,
    *,
    title: str,
    lead: list[str],
    table: tuple[list[str], list[list[str]]],
    sections: list[tuple[str, str, Path | list[Caption]]],
    foot: list[str],
) -> None:
    """Write the report.

    Args:
        lead, foot: paragraphs, plain text.
        table: its head and rows.
        sections: heading, plain text, and a picture or captions.
    """
    head, rows = table
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(text)}</p>" for text in lead)]
    parts += [f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>\n{cells}</table>"]
    for heading, text, content in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>\n<p class=note>{html.escape(text)}</p>")
        if isinstance(content, Path):
            alternative = html.escape(heading, quote=True)
            parts.append(f'<img alt="{alternative}" src="{data_url(content.read_bytes())}">')
        else:
            parts += map(caption_block, content)
    parts += [f"<p class=note>{html.escape(text)}</p>" for text in foot]
    body = "\n".join(parts)
    file.write_text(
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>\n"
        f'<meta name=viewport content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n{body}\n</html>\n'
    )


def caption_block(caption: Caption) -> str:
    """One caption beside its picture."""
    instruction = " ".join(piece.text for piece in caption.pieces if not piece.is_target)
    text = []
    for piece in caption.pieces:
        if not piece.is_target:
            continue
        inner = html.escape(piece.text)
        inner = f"<b>{inner}</b>" if piece.needs_image else inner
        inner = inner if piece.is_kept else f"<s>{inner}</s>"
        shade = NORM(piece.score)
        colour = "".join(f"{round(255 * part):02x}" for part in SCORES(shade)[:3])
        ink = "#fff" if shade > 0.55 else "#1c2530"
        style = f"background:#{colour};color:{ink}"
        text.append(f'{" " if piece.begins_word else ""}<span title="{piece.score:.2f}" style="{style}">{inner}</span>')
    picture = io.BytesIO()
    Image.fromarray(veiled(caption.image, caption.has_run)).save(picture, "png")
    body = "".join(text).strip()
    image = f'<img alt="" src="{data_url(picture.getvalue())}">'
    return f"<div class=caption>{image}<p><i>{html.escape(instruction)}</i>{body}</p></div>"


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
