"""Files of settings are read strictly, results are written whole, and where they cannot be is said before the work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from vtp_plugin import config, files, plugins, settings
from vtp_plugin.errors import LONGEST, PruningError, one_line, reason, sentence

MODULE = '''
from dataclasses import dataclass
from vtp_plugin import PruningStrategy, Stage

@dataclass(kw_only=True)
class Mine(PruningStrategy):
    """Keep the first tokens."""

    name, stage, paper = "mine", Stage.PROJECTOR, "none"

    def score(self, visual):
        return -visual.index.float()
'''


def refusal(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(PruningError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"a: \xff", "not UTF-8 text (byte 3)"),
        (b"a: 1\na: 2", "'a' is given twice, in line 1 and here, line 2"),
        (b"a: !!python/name:os.system x", "tags such as !!python/name:os.system are not read, line 1"),
        (b"a: !!timestamp 2024-01-01", "tags such as !!timestamp"),
        (b"1: a", "the key 1 is no text"),
        (b"? [a]\n: b", "the key seq"),
        (b"a: " + b"9" * 400, "a number of that size is not possible here, line 1"),
        (b"a: 1e999", "a number has to be finite"),
        (b"a: .nan", "a number has to be finite"),
        (b"a: !!float x", "'x' is no number"),
        (b"a: !!bool x", "'x' is neither true nor false"),
        (b"[" * 3000, "not valid YAML"),
        (b"- " * 100 + b"a", "more than 32 levels"),
        (b"a: &a [*a]", "recursive"),
        (b"a: " + b"x" * (files.LARGEST + 1), "larger than 8 MB"),
    ],
)
def test_what_is_not_plain_is_refused_with_the_files_name(tmp_path: Path, text: bytes, sentence: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text)
    said = refusal(files.read_yaml, path)
    assert said.startswith(f"{path}: ")
    assert sentence in said


def test_an_alias_of_aliases_does_not_grow_without_end(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "200000 values" in refusal(files.parse_yaml, "\n".join(lines))


def test_values_are_what_they_look_like() -> None:
    text = "a: 5e-1\nb: 2024-01-01\nc: 1:30\nd: 010\ne: true\nf: ~\ng: -3\nh: .5\ni: 0x10\nj: 1e3"
    read = files.parse_yaml(text)
    assert list(read.values()) == [0.5, "2024-01-01", "1:30", 10, True, None, -3, 0.5, 16, 1000.0]
    assert [type(value) for value in read.values()][3:5] == [int, bool]
    assert files.parse_yaml("x: &x {a: 1}\ny: {<<: *x, b: 2}")["y"] == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", ["{", '{"a": 1', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "3"])
def test_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert refusal(files.read_json, tmp_path / "a.json").startswith(f"{tmp_path / 'a.json'}: ")


@pytest.mark.parametrize("text", ["<<: {a: 1, a: 2}", "<<: [{a: 1}, {a: 2}]", "<<: {a: 1}\n<<: {a: 2}"])
def test_a_key_that_is_merged_in_twice_is_refused(text: str) -> None:
    assert "'a' is merged in twice" in refusal(files.parse_yaml, text)
    assert files.parse_yaml("<<: {a: 1, b: 2}\na: 3") == {"a": 3, "b": 2}


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "before \udcff")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert refusal(files.write, path, "after") == f"cannot write '{path}': No space left on device"
    assert path.read_text() == "before \\udcff"
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "it is a folder" in refusal(files.check_output, tmp_path)
    assert "no such folder" in refusal(files.check_output, tmp_path / "nowhere" / "a")
    assert "no such folder" in refusal(files.check_output, tmp_path / "file" / "a")
    assert "too long" in refusal(files.check_output, tmp_path / ("x" * 300))
    assert "no ordinary file" in refusal(files.check_output, "/dev/null")
    assert "must end in .png" in refusal(files.check_output, tmp_path / "a.txt", kinds=(".png",))
    assert "is no folder" in refusal(files.check_folder, tmp_path / "file")
    assert "is no folder" in refusal(files.check_folder, tmp_path / "file" / "a")
    assert "too long" in refusal(files.check_folder, tmp_path / "new" / ("x" * 300))
    for name in ("bob's", "a,b", "a\nb", "[red]", "new/deep"):
        files.check_folder(tmp_path / name)
    files.check_output(tmp_path / "bob's [red].json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_links_are_followed_before_the_work_and_nothing_is_written_over_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("mine")
    for name, leads in (("far", "nowhere/a"), ("same", "picture.png"), ("round", "round"), ("new", "made.txt")):
        (tmp_path / name).symlink_to(leads)
    assert f"no such folder: {tmp_path / 'nowhere'}" in refusal(files.check_output, tmp_path / "far")
    assert "leads to itself" in refusal(files.check_output, tmp_path / "round")
    assert "leads to itself" in refusal(files.write, tmp_path / "round", "x")
    for name in ("picture.png", "same", "./picture.png"):
        assert "it is read, too" in refusal(files.check_output, tmp_path / name, read=[tmp_path / "picture.png"])
    files.check_output(tmp_path / "new")
    files.write(tmp_path / "new", "made")
    assert (tmp_path / "made.txt").read_text() == "made"
    assert (tmp_path / "new").is_symlink()


def test_threads_that_write_one_file_leave_one_of_their_texts_and_its_mode(tmp_path: Path) -> None:
    path, failed = tmp_path / "a.txt", []
    path.write_text("")
    path.chmod(0o640)

    def work(letter: str) -> None:
        try:
            for _ in range(50):
                files.write(path, letter * 1000)
        except PruningError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set(path.read_text())) == 1
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(files.check_output, tmp_path / "a")
    tmp_path.chmod(0o700)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_that_a_terminal_shows_as_it_is() -> None:
    assert one_line("a\n  b\x1b[31m\u202e[red]") == "a b\\x1b[31m\\u202e[red]"
    assert len(one_line("x" * 10**6)) < LONGEST + 10
    assert sentence(PruningError("as it is")) == "as it is"
    assert sentence(ModuleNotFoundError("No module", name="jinja2")).startswith("the package 'jinja2' is not installed")
    assert sentence(OSError(28, "No space left", "a")) == "No space left: a"
    assert "VTP_TRACEBACK=1" in sentence(KeyError("x"))


def test_what_a_host_tried_several_times_is_said_by_what_it_failed_of() -> None:
    """lmms-eval reads data sets through tenacity, whose own error names a future at an address."""
    tenacity = pytest.importorskip("tenacity")

    def read() -> None:
        raise FileNotFoundError(2, "No such file", "/nowhere/hub")

    with pytest.raises(tenacity.RetryError) as gave_up:
        tenacity.Retrying(stop=tenacity.stop_after_attempt(2))(read)
    assert reason(gave_up.value) == "FileNotFoundError: [Errno 2] No such file: '/nowhere/hub'"
    assert reason(PruningError("as it is")) == "as it is"


# -- settings by name -------------------------------------------------------------------------------------------------


def test_settings_have_names() -> None:
    (fastv,) = config.resolve("fastv:k2_r50")
    assert (fastv.layer, fastv.keep_ratio) == (2, 0.5)
    assert config.resolve("fastv:k2_r50", {"layer": 3})[0].layer == 3
    atp, composed = config.resolve("fastv:k3_r75+atp:corrected")
    assert (atp.relevance_sign, composed.keep_ratio) == (1, 0.25) or (atp.name, composed.layer) == ("atp", 3)
    assert config.resolve("prumerge_plus:64")[0].name == "prumerge_plus"
    said = refusal(config.resolve, "fastv:k2_r5")
    assert said.startswith("unknown setting 'k2_r5' of 'fastv'. Did you mean 'k2_r50'? Settings: k2_r50, ")
    assert "use + to compose" in refusal(config.resolve, "atp,fastv")


def test_every_file_of_a_setting_has_a_name_and_a_source() -> None:
    found = {f"{name}:{each.name}" for name in plugins.list_strategies() for each in settings.of(name)}
    assert len(found) == len(list((settings.CONFIGS / "strategies").glob("*.yaml")))
    for spec in found:
        name, _, setting = spec.partition(":")
        assert config.resolve(spec)[0].name == name
        assert next(each for each in settings.of(name) if each.name == setting).source


def test_a_value_given_twice_is_refused_with_both() -> None:
    said = refusal(config.parse_pairs, "keep-ratio=0.5,keep_ratio=0.6")
    assert said == "given twice with different values: keep-ratio=0.5 and keep_ratio=0.6"
    assert "fastv.layer=3" in refusal(config.resolve, "fastv", {"layer": 2, "fastv.layer": 3})


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("atp", {"relevance_sign": True}), ("l2", {"center": 1}), ("fastv", {"invert": 0}), ("atp", {"layer": True}),
        ("atp", {"clip": 5}), ("atp", {"alpha": 10**400}), ("random", {"seed": 10**400}), ("vprune", {"group": 999}),
        ("sparsevlm", {"recycle": 1}), ("fitprune", {"schedule": "²"}), ("fitprune", {"schedule": "x" * 5000}),
        ("vprune", {"chi2_threshold": float("inf")}),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_no_value(spec: str, fields: dict[str, Any]) -> None:
    assert refusal(config.resolve, spec, fields).startswith(f"{spec}: {next(iter(fields))} must be")


# -- files of one's own -----------------------------------------------------------------------------------------------


def test_a_module_joins_every_command_and_what_it_starts(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text(MODULE)  # a name that the standard library has, too
    code = (
        "import os, sys, subprocess; from vtp_plugin.cli import run\n"
        f"assert run(['list', 'mine', '--module', {str(tmp_path / 'random.py')!r}]) == 0\n"
        "child = 'from vtp_plugin import list_strategies; assert \"mine\" in list_strategies()'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
        "import random; random.random()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "mine (projector stage): Keep the first tokens." in ran.stdout


def test_a_module_that_is_none_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nraise SystemExit(3)\n")
    assert refusal(plugins.join, [path]).startswith(f"{path}:2 cannot be imported: SystemExit")
    assert refusal(plugins.join, [tmp_path / "nowhere.py"]).startswith("file not found")
