"""Bad images are found once, remembered, and reported or left out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import datasets
import pytest
from image_fixtures import image_folder, options, png, run_python

from vit_dist.data import verify as module
from vit_dist.data.columns import common_table
from vit_dist.data.decode import DecodeRules
from vit_dist.data.source import load_source
from vit_dist.data.verify import BadRow, apply_policy, fraction_to_skip, verify
from vit_dist.errors import UserError

RULES = DecodeRules()


@pytest.fixture
def folder(tmp_path):
    root = image_folder(tmp_path / "data", {"cat": 60, "dog": 60})
    (root / "cat" / "7.png").write_bytes(b"")
    (root / "dog" / "5.png").write_bytes(b"<html>")
    (root / "dog" / "9.png").unlink()
    (root / "dog" / "9.png").symlink_to("nowhere.png")
    return root


@pytest.fixture
def rows(folder, tmp_path):
    return load_source(options(folder, tmp_path / "cache")).tables["train"]


@pytest.fixture
def count(monkeypatch):
    """How many images were decoded."""
    calls = []
    look = module._look
    monkeypatch.setattr(module, "_look", lambda *args: calls.append(1) or look(*args))
    return calls


def test_bad_images_are_listed_in_order_with_their_reasons(rows, tmp_path):
    bad = verify(rows, RULES, workers=3, cache_dir=str(tmp_path)).bad
    assert [row.id for row in bad] == ["cat/7.png", "dog/5.png", "dog/9.png"]
    assert [rows[row.index]["id"] for row in bad] == [row.id for row in bad]
    assert "empty" in bad[0].reason and "HTML" in bad[1].reason and "No such file" in bad[2].reason


def test_each_image_is_decoded_once_until_something_changes(rows, folder, tmp_path, count):
    bad = verify(rows, RULES, cache_dir=str(tmp_path)).bad
    assert len(count) == 120
    assert verify(rows, RULES, cache_dir=str(tmp_path)).bad == bad and len(count) == 120
    assert len(verify(rows, DecodeRules(min_image_side=5), cache_dir=str(tmp_path)).bad) == 120 and len(count) == 240
    size = (folder / "cat" / "1.png").stat().st_size
    (folder / "cat" / "1.png").write_bytes(b"x" * size)  # same name, same size
    assert len(verify(rows, RULES, cache_dir=str(tmp_path)).bad) == 4 and len(count) == 360


def test_a_damaged_record_is_made_again(rows, tmp_path, count):
    bad = verify(rows, RULES, cache_dir=str(tmp_path)).bad
    (record,) = (tmp_path / "vit_dist").glob("verified-*.sealed")
    record.write_bytes(record.read_bytes()[:-5])
    assert verify(rows, RULES, cache_dir=str(tmp_path)).bad == bad and len(count) == 240


def test_progress_reaches_the_total(rows, tmp_path):
    seen: list[tuple[int, int]] = []
    verify(rows, RULES, cache_dir=str(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (120, 120) and seen == sorted(seen) and len(seen) > 1


def test_embedded_images_and_selections(tmp_path):
    data = [png(), b"broken", png(), b"", png()]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": item, "path": None} for item in data], "label": [0, 1, 0, 1, 0]},
        features=datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64")),
    )
    table = common_table(table, "image", "label", [f"t#{row}" for row in range(5)]).select([4, 3, 1])
    bad = verify(table, RULES, cache_dir=str(tmp_path)).bad
    assert [(row.index, row.id) for row in bad] == [(1, "t#3"), (2, "t#1")]


def test_images_are_verified_once_by_two_processes(folder, tmp_path):
    code = (
        "from vit_dist.data import source, verify, decode\n"
        "rows, done = source.load_source(options).tables['train'], []\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "note = lambda *_: done.append(1)\n"
        "bad = verify.verify(rows, decode.DecodeRules(), cache_dir=options.cache_dir, progress=note).bad\n"
        "print(len(bad), bool(done))"
    )
    runs = [run_python(code, data_options=options(folder, tmp_path / "cache")) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    outputs = [run.communicate(timeout=60)[0].split() for run in runs]
    assert sorted(outputs) == [["3", "False"], ["3", "True"]]


def test_bad_images_stop_the_run_by_default(rows, tmp_path):
    bad = [BadRow(index, f"{index}.png", "empty file") for index in range(12)]
    with pytest.raises(UserError) as caught:
        apply_policy(rows, bad, options("x", tmp_path), "train")
    message = str(caught.value)
    assert "12 of 120 images of train" in message and "--on_bad_image skip" in message
    assert "9.png: empty file" in message and "10.png" not in message and "2 more" in message


def test_advice_to_leave_out_many_bad_images_works_as_it_is_given(rows, tmp_path):
    bad = [BadRow(index, f"{index}.png", "empty file") for index in range(5)]
    with pytest.raises(UserError, match=r"--on_bad_image skip --max_bad_fraction 0\.05:"):
        apply_policy(rows, bad, options("x", tmp_path), "train")
    apply_policy(rows, bad, options("x", tmp_path, on_bad_image="skip", max_bad_fraction=0.05), "train")


@pytest.mark.parametrize(("missing", "kind"), [(True, "are missing"), (False, "do not decode")])
@pytest.mark.parametrize("count", range(1, 120, 7))
def test_advice_for_too_many_skipped_images_works_as_it_is_given(rows, tmp_path, missing, kind, count):
    bad = [BadRow(index, f"{index}.png", "no such file", missing) for index in range(count)]
    needed = fraction_to_skip([(count, 120), (0, 8), (0, 0)])
    if needed > 0.01:
        with pytest.raises(
            UserError, match=rf"{count} of 120 images of train {kind} .*pass --max_bad_fraction {needed}"
        ):
            apply_policy(rows, bad, options("x", tmp_path, on_bad_image="skip"), "train", needed)
    kept, _ = apply_policy(rows, bad, options("x", tmp_path, on_bad_image="skip", max_bad_fraction=needed), "train")
    assert len(kept) == 120 - count


def test_bad_images_are_left_out_on_request(rows, tmp_path):
    bad = [BadRow(7, "cat/7.png", "empty file")]
    kept, keep = apply_policy(rows, bad, options("x", tmp_path, on_bad_image="skip"), "train")
    assert keep.sum() == 119 and list(kept["id"]) == [id for index, id in enumerate(rows["id"]) if index != 7]
    assert apply_policy(rows, [], options("x", tmp_path), "train")[0] is rows


def test_too_many_bad_images_stop_the_run_all_the_same(rows, tmp_path):
    bad = [BadRow(index, f"{index}.png", "empty file") for index in range(2)]
    with pytest.raises(UserError, match=r"2 of 120 .*1\.67%.*--on_bad_image skip.*--max_bad_fraction 0\.01"):
        apply_policy(rows, bad, options("x", tmp_path, on_bad_image="skip"), "train")
    every = [BadRow(index, f"{index}.png", "empty file") for index in range(120)]
    with pytest.raises(UserError, match="120 of 120"):
        apply_policy(rows, every, options("x", tmp_path, on_bad_image="skip", max_bad_fraction=1.0), "train")


@contextlib.contextmanager
def unprivileged():
    """The superuser may read everything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_unreadable_file_is_bad_until_it_can_be_read():
    with tempfile.TemporaryDirectory() as root:  # pytest's folders are closed to other users
        data, caches = image_folder(Path(root) / "data", {"cat": 3, "dog": 3}), Path(root) / "caches"
        caches.mkdir()
        for path in (Path(root), caches):
            path.chmod(0o777)
        rows = load_source(options(data, Path(root) / "cache")).tables["train"]
        (data / "cat" / "2.png").chmod(0)
        with unprivileged():
            assert [row.id for row in verify(rows, RULES, cache_dir=str(caches)).bad] == ["cat/2.png"]
        (data / "cat" / "2.png").chmod(0o644)
        with unprivileged():
            assert not verify(rows, RULES, cache_dir=str(caches)).bad
