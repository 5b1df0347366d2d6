"""Keep the documentation true: links and paths resolve, generated tables agree with the code, the README stays short.

python docs/check.py            report what is wrong, exit 1
python docs/check.py --write    write the generated tables anew, then check
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tower_share  # noqa: E402
from regate_megatron.config import ReGateConfig, flag, shown_default  # noqa: E402
from regate_megatron.method.recipes import RECIPES  # noqa: E402
from regate_megatron.method.scores import SCORES  # noqa: E402
from regate_megatron.support import RULES  # noqa: E402

README_WORDS = 1300
FLAGS = {flag(field.name) for field in dataclasses.fields(ReGateConfig)}
ROOMS = (
    "benchmarks|docs|examples(?!/multimodal)|patches|regate_megatron|scripts|tests|tools"  # that one is Megatron-LM's
)


def flag_table() -> str:
    """The flags, their defaults and what they do, from the fields of ReGateConfig."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(ReGateConfig):
        choices = field.metadata["choices"]
        value = "{" + ",".join(choices) + "}" if choices else field.metadata["metavar"] or ""
        name = f"`{flag(field.name)}{' ' + value if value and field.name != 'enabled' else ''}`".replace("|", "\\|")
        lines.append(f"| {name} | {shown_default(field)} | {field.metadata['help'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def score_table() -> str:
    """The scores and what they need, from the rows of regate_megatron/method/scores.py."""
    lines = ["| score | formula | a teacher? | learns from the student's losses? |", "|---|---|---|---|"]
    for name, row in SCORES.items():
        needs = ("yes" if one else "no" for one in (row.needs_reference, row.needs_difficulty))
        formula = row.formula.replace("|", chr(92) + "|")
        lines.append(f"| `{name}` | {formula} | {' | '.join(needs)} |")
    return "\n".join(lines)


def recipe_table() -> str:
    """The recipes, from the rows of regate_megatron/method/recipes.py: of each what differs from the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(ReGateConfig)}
    lines = ["| recipe | for | what differs from the defaults | evidence |", "|---|---|---|---|"]
    for name, row in RECIPES.items():
        other = {field: value for field, value in row.values.items() if value != defaults[field]}
        said = ", ".join(f"`{flag(field)} {value}`" for field, value in other.items()) or "nothing today"
        lines.append(f"| `{name}` | {row.purpose} | {said} | {row.evidence} |")
    return "\n".join(lines)


def support_table() -> str:
    """What is refused before step 0, from the rules of regate_megatron/support."""
    lines = ["| what | allowed | why | what to change |", "|---|---|---|---|"]
    lines += [f"| {rule.what} | {rule.allowed} | {rule.why} | {rule.change} |" for rule in RULES]
    return "\n".join(lines)


TABLES = {
    "flags": flag_table,
    "scores": score_table,
    "recipes": recipe_table,
    "support": support_table,
    "towers": lambda: "\n".join(tower_share.table()),
}


def with_tables(text: str) -> str:
    """``text`` with every ``<!-- name -->…<!-- /name -->`` block filled anew."""
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.S)
    return text


def anchors(page: Path) -> set[str]:
    """What links into a page may name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ +(.+?) *$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problems_of(page: Path, text: str) -> Iterator[str]:
    """What a page says that is not so."""
    if with_tables(text) != text:
        yield "its tables are stale: --write"
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file = page.parent / target if target else page
        if not file.exists():
            yield f"no such file: {target}"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"no such heading: {target}#{anchor}"
    for path in re.findall(rf"`((?:{ROOMS})/[\w./-]*)(?:::\w+)?`", text):
        if not (ROOT / path).exists():
            yield f"no such path: {path}"
    for name in sorted(set(re.findall(r"--regate(?:-[a-z]+)*", text)) - FLAGS):
        yield f"no such flag: {name}"
    if page.name == "README.md" and page.parent == ROOT and (words := len(text.split())) > README_WORDS:
        yield f"{words} words, at most {README_WORDS}: what not everyone needs goes to docs/"


def main() -> int:
    """Check all pages; returns the exit code."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "patches").glob("*.md"))]
    pages += sorted((ROOT / "examples").glob("**/*.md"))
    problems, missing = [], set(TABLES)
    for page in pages:
        text = page.read_text()
        missing -= {name for name in TABLES if f"<!-- {name} -->" in text}
        if "--write" in sys.argv[1:]:
            text = with_tables(text)
            page.write_text(text)
        problems += [f"{page.relative_to(ROOT)}: {problem}" for problem in problems_of(page, text)]
    problems += [f"no page has the table of {name}" for name in sorted(missing)]
    print("\n".join(problems) or f"{len(pages)} pages: links and paths resolve, tables agree with the code")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
