"""The pages agree with the code, and docs/check.py sees where they do not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("docs_check", ROOT / "docs" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_agree_with_the_code(check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == 0, capsys.readouterr().out


WRONG = {
    "a link to nowhere": ("[page](none.md)", "no such file: none.md"),
    "a heading that is not there": ("# One heading\n[here](#two)", "no such heading: #two"),
    "a file that is not there": ("`regate_megatron/none.py`", "no such path: regate_megatron/none.py"),
    "a flag that is not there": ("`--regate-keep-ration 0.5`", "no such flag: --regate-keep-ration"),
    "a table of another time": ("<!-- scores -->\nold\n<!-- /scores -->", "its tables are stale: --write"),
}


@pytest.mark.parametrize(("text", "problem"), WRONG.values(), ids=WRONG)
def test_what_a_page_says_that_is_not_so_is_found(check, tmp_path, text, problem):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert list(check.problems_of(page, text)) == [problem]


def test_a_page_that_is_right_has_no_problems(check, tmp_path):
    text = check.with_tables(
        "# One heading\n[here](#one-heading) [there](https://example.org/none) `regate_megatron/compat.py`\n"
        "`tests/unit/test_docs.py::check` `--regate --regate-keep-ratio 0.5`\n<!-- flags --><!-- /flags -->"
    )
    page = tmp_path / "page.md"
    page.write_text(text)
    assert list(check.problems_of(page, text)) == [] and "| `--regate-keep-ratio P` | 0.5 |" in text


def test_a_readme_that_grows_is_found(check):
    words = "word " * (check.README_WORDS + 1)
    assert any("at most 1300" in problem for problem in check.problems_of(ROOT / "README.md", words))
