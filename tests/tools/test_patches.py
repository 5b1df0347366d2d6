"""patches/apply.py on a copy of a Megatron-LM checkout's scripts."""

import hashlib
import importlib.util
import py_compile
import shutil
import sys
from pathlib import Path

import pytest

from tests.scripts.checkouts import HOW, found

APPLY = Path(__file__).resolve().parents[2] / "patches" / "apply.py"
TAGS = ("core_v0.17.1", "core_v0.18.2", "core_v0.19.0", "main_d98e8a64dd")
SCRIPT = "pretrain_vlm.py"  # the one looked at in tests of a single script


@pytest.fixture(scope="module")
def patches():
    spec = importlib.util.spec_from_file_location("regate_patches_apply", APPLY)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=TAGS)
def tag(request):
    """The tag of :func:`checkout`."""
    return request.param


@pytest.fixture
def checkout(patches, tag, tmp_path):
    """A folder with the scripts of the tag, copied from one of MEGATRON_LM_DIRS."""
    of_tag = [one for one in patches.known_patches() if one.tag == tag]
    for source in found():
        scripts = [source.path / one.script for one in of_tag]
        if all(s.is_file() and _sha256(s) == one.before for s, one in zip(scripts, of_tag, strict=True)):
            for script in scripts:
                shutil.copy(script, tmp_path / script.name)
            return tmp_path
    pytest.skip(f"no checkout of {tag}: {HOW}")


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refusal(patches, capsys, command, checkout):
    assert patches.main([command, str(checkout)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("regate: ")
    assert all(word in lines[0] for word in ("given", "allowed", "change"))
    return lines[0]


def test_apply_adds_one_call_and_revert_gives_the_original_bytes(patches, tag, checkout, capsys):
    scripts = [checkout / one.script for one in patches.known_patches() if one.tag == tag]
    assert len(scripts) == 3
    originals = [script.read_bytes() for script in scripts]
    scripts[0].chmod(0o755)
    assert patches.main(["check", str(checkout)]) == 0
    assert capsys.readouterr().out.count(f"{tag}, not patched") == 3
    assert patches.main(["apply", str(checkout)]) == 0
    for script in scripts:
        content = script.read_text()
        assert content.count("megatron_lm.install_from_argv()") == 1
        _, main_block = content.split('if __name__ == "__main__":')
        assert main_block.index("install_from_argv") < main_block.index("    pretrain(")
        py_compile.compile(str(script), cfile=str(checkout / "compiled"), doraise=True)
    assert scripts[0].stat().st_mode & 0o777 == 0o755
    capsys.readouterr()
    assert patches.main(["check", str(checkout)]) == 0
    assert capsys.readouterr().out.count(f"{tag}, patched") == 3
    assert patches.main(["revert", str(checkout)]) == 0
    assert [script.read_bytes() for script in scripts] == originals


def test_twice_is_as_good_as_once(patches, checkout, capsys):
    patches.main(["apply", str(checkout)])
    content = (checkout / SCRIPT).read_bytes()
    capsys.readouterr()
    assert patches.main(["apply", str(checkout)]) == 0
    assert "patched already, nothing to do" in capsys.readouterr().out
    assert (checkout / SCRIPT).read_bytes() == content
    patches.main(["revert", str(checkout)])
    capsys.readouterr()
    assert patches.main(["revert", str(checkout)]) == 0
    assert "not patched, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "apply", "revert"])
def test_a_script_with_other_content_is_refused_and_left_alone(patches, tag, checkout, capsys, command):
    script = checkout / SCRIPT
    script.write_bytes(script.read_bytes() + b"\n# ours\n")
    content = script.read_bytes()
    assert tag in _refusal(patches, capsys, command, checkout)
    assert script.read_bytes() == content


def test_a_folder_without_the_script_is_refused(patches, tmp_path, capsys):
    assert "does not exist" in _refusal(patches, capsys, "apply", tmp_path)


def test_a_diff_that_does_not_fit_raises(patches):
    diff = "--- a\n+++ b\n@@ -2 +2,2 @@\n two\n+three\n"
    assert patches.patched(b"one\ntwo\n", diff) == b"one\ntwo\nthree\n"
    assert patches.patched(b"one\ntwo\nthree\n", diff, reverse=True) == b"one\ntwo\n"
    with pytest.raises(ValueError, match="line 2"):
        patches.patched(b"one\n2\n", diff)


def test_diffs_hold_hardly_anything_but_our_lines(patches):
    for one in patches.known_patches():
        body = [row for row in one.diff.splitlines() if not row.startswith(("---", "+++", "@@"))]
        assert sum(row.startswith(" ") for row in body) <= 2
        assert not any(row.startswith("-") for row in body)
