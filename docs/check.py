"""Keep the documentation true: relative links resolve, and generated tables agree with the code.

python docs/check.py            report what is wrong, exit 1
python docs/check.py --write    write the generated tables anew, then check
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from regate_megatron.config import ReGateConfig, flag  # noqa: E402
from regate_megatron.support import RULES  # noqa: E402


def flag_table() -> str:
    """The flags, their defaults and what they do, from the fields of ReGateConfig."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(ReGateConfig):
        choices = field.metadata["choices"]
        value = "{" + ",".join(choices) + "}" if choices else field.metadata["metavar"] or ""
        name = f"`{flag(field.name)}{' ' + value if value and field.name != 'enabled' else ''}`".replace("|", "\\|")
        default = "off" if isinstance(field.default, bool) else "none" if field.default is None else field.default
        lines.append(f"| {name} | {default} | {field.metadata['help'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def support_table() -> str:
    """What is refused before step 0, from the rules of regate_megatron/support."""
    lines = ["| what | allowed | why | what to change |", "|---|---|---|---|"]
    lines += [f"| {rule.what} | {rule.allowed} | {rule.why} | {rule.change} |" for rule in RULES]
    return "\n".join(lines)


TABLES = {"flags": flag_table, "support": support_table}


def with_tables(text: str) -> str:
    """``text`` with every ``<!-- name -->…<!-- /name -->`` block filled anew."""
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.S)
    return text


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    return [target for target in local if not (page.parent / target).exists()]


def main() -> int:
    """Check all pages; returns the exit code."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "patches").glob("*.md"))]
    pages += sorted((ROOT / "examples").glob("**/*.md"))
    problems = []
    for page in pages:
        text = page.read_text()
        if "--write" in sys.argv[1:]:
            text = with_tables(text)
            page.write_text(text)
        if with_tables(text) != text:
            problems.append(f"{page.relative_to(ROOT)}: its tables are stale: --write")
        problems += [f"{page.relative_to(ROOT)}: no such file: {target}" for target in broken_links(page)]
    print("\n".join(problems) or f"{len(pages)} pages: links resolve, tables agree with the code")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
