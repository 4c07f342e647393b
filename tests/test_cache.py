"""The cache of shrunk images: built once, whole or not at all, and the same training from it however it is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import losses
from lab import ARGS, Lab, fingerprint
from PIL import Image
from torch.utils.data import DataLoader

from vit_dist import stop
from vit_dist.commands import cache as verb
from vit_dist.data import image_cache
from vit_dist.data.dataset import collate
from vit_dist.data.image_cache import CachedDataset, Estimate, about, cache_of, caches, reason_against
from vit_dist.data.pipeline import ImageData, build_data
from vit_dist.data.pixels import Pixels
from vit_dist.data.resident import place_images
from vit_dist.errors import UserError
from vit_dist.files import SEAL, seal
from vit_dist.options import DataOptions, ModelOptions

CPU = torch.device("cpu")
SIDE, SHORTEST = 32, 36  # of the tiny model's input, and of what is kept


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several sizes, much larger than needed, and one PNG that is smaller; two classes, three splits."""
    root, random = tmp_path_factory.mktemp("camera"), np.random.default_rng(2)
    for split, count in (("train", 60), ("validation", 12), ("test", 12)):
        for number in range(count):
            label = number % 2
            blobs = random.integers(0, 200, (6, 8, 3), dtype=np.uint8)
            blobs[..., label] //= 3
            image = Image.fromarray(blobs).resize((400 + 8 * (number % 5), 300), Image.Resampling.BICUBIC)
            path = root / split / "ab"[label] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)
    Image.new("RGB", (20, 30), (9, 99, 199)).save(root / "train" / "a" / "small.png")
    return root


def data_of(folder: Path, cache: Path, **options: Any) -> ImageData:
    given = DataOptions(data=str(folder), cache_dir=str(cache), **options)
    return build_data(given, ModelOptions(model="tiny"), 0, lambda title: lambda done, total: None)


def placed(data: ImageData, cache: Path) -> ImageData:
    return place_images(data, "cache", CPU, 0, cache_dir=str(cache))[0]


def contents(cache: Path) -> dict[str, str]:
    """SHA-256 of all that lies in caches, by name; also of what should not be there."""
    files = [path for path in (cache / "vit_dist").rglob("*") if path.is_file() and "images-" in str(path)]
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.suffix != ".lock"
    }


def start(act: Callable[[], Any]) -> int:
    """Run in a process of its own, forked: the imports are paid once. Its exit code is what `act` returns."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = act() or 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_cached_images_are_shrunk_and_never_enlarged(camera: Path, tmp_path: Path) -> None:
    data = data_of(camera, tmp_path)
    kept = placed(data, tmp_path).train
    assert isinstance(kept, CachedDataset) and kept.ids == data.train.ids
    for index, name in enumerate(data.train.ids):
        whole, small = data.train.decoded(index), kept.decoded(index)
        expected = (20, 30) if name.endswith(".png") else (round(whole.width * SHORTEST / 300), SHORTEST)
        assert small.size == expected
        near = np.asarray(whole.resize(small.size, Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(np.asarray(small) - near).mean() < 3
    found = about(kept.folder)
    assert found is not None and (found.images, found.side, found.shortest) == (61, SIDE, SHORTEST)
    assert found.bytes == (kept.folder / "pixels").stat().st_size


def test_cache_gives_the_same_pixels_with_workers_and_reopened(camera: Path, tmp_path: Path) -> None:
    kept = placed(data_of(camera, tmp_path), tmp_path).train
    keys = [3 * 61 + index for index in range(61)]
    expected = kept.__getitems__(keys)
    assert expected["pixel_values"].dtype == torch.uint8 and expected["pixel_values"].shape == (61, 3, SIDE, SIDE)
    assert not torch.equal(expected["pixel_values"], kept.__getitems__(list(range(61)))["pixel_values"])
    batches = list(DataLoader(kept, sampler=keys, batch_size=7, collate_fn=collate, num_workers=2))
    for name, values in expected.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), values)
    again = placed(data_of(camera, tmp_path), tmp_path).train
    assert torch.equal(again.__getitems__(keys)["pixel_values"], expected["pixel_values"])
    assert len(pickle.dumps(kept)) < 2 * len(pickle.dumps(kept.table)) + 10_000, "a worker opens the file itself"


def test_cached_images_are_close_to_streamed_ones(camera: Path, tmp_path: Path) -> None:
    """Without crops, which of a shrunk image have other sizes in pixels."""
    data = data_of(camera, tmp_path)
    kept = placed(data, tmp_path).validation.__getitems__(list(range(12)))
    streamed = place_images(data, "stream", CPU, 0)[0].validation
    expected = streamed.__getitems__(list(range(12)))
    assert (kept["pixel_values"].float() - expected["pixel_values"].float()).abs().mean() < 5


def test_cache_is_built_once_by_two_processes(camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, built = image_cache._build, tmp_path / "built"

    def noted(*args: Any) -> None:
        with built.open("a") as file:
            file.write(f"{args[1].name} {os.getpid()}\n")
        time.sleep(0.3)  # the other one comes and waits
        build(*args)

    monkeypatch.setattr(image_cache, "_build", noted)
    argv = ["--data", str(camera), "--model", "tiny", "--cache_dir", str(tmp_path / "cache")]
    pids = [start(lambda: verb.main(argv)) for _ in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0]
    names = [line.split()[0] for line in built.read_text().splitlines()]
    assert len(names) == len(set(names)) == 3, "each split once"


def test_cache_killed_while_built_is_built_by_the_next_start(
    camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, with some images on the disk and before the names are in their places."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    placed(data_of(camera, whole), whole)
    data = data_of(camera, killed)
    folder = cache_of(data.train, str(killed))
    partial = folder.with_name(f".{folder.name}.partial")
    shrunk, rename = image_cache._shrunk, Path.rename

    def slowly(*args: Any) -> Any:
        time.sleep(0.02)
        return shrunk(*args)

    def forever(self: Path, target: Path) -> Any:
        time.sleep(60) if target == folder else rename(self, target)

    for name, owner, fake, seen in (
        ("_shrunk", image_cache, slowly, lambda: (partial / "pixels").exists() and (partial / "pixels").stat().st_size),
        ("rename", Path, forever, lambda: (partial / "about.json").exists()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fake)
            pid = start(lambda: placed(data, killed) and 0)
            deadline = time.monotonic() + 30
            while not seen():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            assert ended(pid) == -signal.SIGKILL
        assert partial.exists() and not folder.exists() and caches(str(killed)) == {}
    placed(data, killed)
    assert not partial.exists() and contents(killed) == contents(whole) and len(contents(whole)) == 9


def test_another_file_rule_or_input_is_another_cache(camera: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(camera, tmp_path / "copy")
    data = data_of(copy, tmp_path)
    first = cache_of(data.train, str(tmp_path))
    assert cache_of(data_of(copy, tmp_path).train, str(tmp_path)) == first
    path = copy / "train" / "a" / "2.jpg"
    path.write_bytes(path.read_bytes())  # as long as before
    others = {
        cache_of(data_of(copy, tmp_path).train, str(tmp_path)),
        cache_of(data_of(copy, tmp_path, image_background="black").train, str(tmp_path)),
        cache_of(data_of(copy, tmp_path).validation, str(tmp_path)),
    }
    data.train.transform.side = 40
    others.add(cache_of(data.train, str(tmp_path)))
    assert len(others) == 4 and first not in others


def test_cache_damaged_is_built_anew(camera: Path, tmp_path: Path) -> None:
    data = data_of(camera, tmp_path)
    folder, before = placed(data, tmp_path).train.folder, contents(tmp_path)
    os.truncate(folder / "pixels", 1000)
    assert about(folder) is None and len(caches(str(tmp_path))) == 2
    placed(data, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["emptied", "flipped"])
def test_cache_with_damaged_index_is_built_anew(camera: Path, tmp_path: Path, damage: str) -> None:
    data = data_of(camera, tmp_path)
    folder, before = placed(data, tmp_path).train.folder, contents(tmp_path)
    index = bytearray((folder / "index.npy").read_bytes())
    index[-1] ^= 1
    (folder / "index.npy").write_bytes(b"" if damage == "emptied" else index)
    placed(data, tmp_path)
    assert contents(tmp_path) == before


def test_cache_on_a_full_disk_is_one_line(camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(camera, tmp_path)
    said = f"the image cache of 61 images in {tmp_path / 'vit_dist'} takes about "
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
        with pytest.raises(UserError, match="bytes, and 5,000 are free: free some, or choose") as caught:
            placed(data, tmp_path)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)  # all pixels are written by then
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): free some") as caught:
            placed(data, tmp_path)
    assert str(caught.value).startswith(said) and not contents(tmp_path)


def test_cache_with_a_bad_image_is_not_built(camera: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(camera, tmp_path / "copy")
    path = copy / "train" / "a" / "2.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(RuntimeError, match=r"image train/a/2.jpg \(row \d+\) does not decode"):
        placed(data_of(copy, tmp_path, verify_images=False), tmp_path)
    assert not contents(tmp_path)


def test_list_and_remove(camera: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = ["--cache_dir", str(tmp_path)]
    assert verb.main(["--list", *where]) == 0
    assert "there is no image cache in " in capfd.readouterr().out
    assert verb.main(["--data", str(camera), "--model", "tiny", *where]) == 0
    out = capfd.readouterr().out
    keys = list(caches(str(tmp_path)))
    assert all(str(tmp_path / "vit_dist" / f"images-{key}") in out for key in keys) and "61 images" in out
    assert verb.main(["--list", *where]) == 0
    lines = capfd.readouterr().out.splitlines()
    total = sum(has.bytes for _, has, _ in caches(str(tmp_path)).values())
    assert [line.split()[0] for line in lines[:-1]] == ["key", *keys]
    assert lines[-1] == f"{total:,} bytes in {tmp_path / 'vit_dist'}"
    assert f"train: {camera}" in "\n".join(lines)
    for wrong in ("", "none"):
        assert verb.main(["--remove", wrong, *where]) == 2
        assert "image caches have a key that begins so" in capfd.readouterr().err
    assert verb.main(["--remove", keys[0][:12], *where]) == 0
    assert "removed" in capfd.readouterr().out and list(caches(str(tmp_path))) == keys[1:]


@pytest.mark.parametrize(
    ("pixels", "epochs", "free", "missing", "said"),
    [
        (2.0, 2, 200, 100, ""),
        (50.0, 1.5, 200, 100, ""),
        (50.0, 2, 0, 0, ""),  # it is there
        (1.9, 2, 200, 100, "images have 1.9 x the pixels that a cache keeps of them"),
        (50.0, 1, 200, 100, "no more than one epoch is trained"),
        (50.0, 2, 199, 100, "a cache takes 100.0 GB, 199.0 are free, twice as many are wanted"),
    ],
)
def test_cache_proposal_follows_from_pixels_epochs_and_disk(
    pixels: float, epochs: float, free: int, missing: int, said: str
) -> None:
    train, small = Estimate(pixels * 1000, 1000, 10), Estimate(5, 5, 10)
    assert reason_against([train, small], epochs, free * 10**9, missing * 10**9) == said
    assert train.bytes == 30_000


def test_cache_size_is_estimated_from_a_sample(camera: Path, tmp_path: Path) -> None:
    data = data_of(camera, tmp_path)
    guess, kept = image_cache.estimate(data.train), about(placed(data, tmp_path).train.folder)
    assert kept is not None and guess.bytes == pytest.approx(kept.bytes, rel=0.02)
    assert guess.pixels == pytest.approx(300 * 416, rel=0.05)


def test_cache_on_gpus_is_proposed_where_it_pays(camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is moved to the device before training; that there is one is made up."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**35))
    monkeypatch.setattr(Pixels, "to", lambda self, device: self)
    data, device = data_of(camera, tmp_path), torch.device("cuda")
    for epochs, said in (
        (1, "not cached: no more than one epoch is trained"), (3, "--image_source cache would decode them only once"),
    ):  # fmt: skip
        found, _, chosen = place_images(data, "auto", device, 0, cache_dir=str(tmp_path), epochs=epochs)
        assert chosen == "stream" and f"(not resident: images of several sizes; {said})" in found.description[-1]


@pytest.fixture(scope="module")
def lab(camera: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With a run from the cache that nothing happened to, in `whole`."""
    root = tmp_path_factory.mktemp("runs")
    lab = Lab(root, ["--data", camera, "--model", checkpoint, *ARGS, "--max_steps", 20, "--cache_dir", root / "cache"])
    lab.run(root / "whole", "--image_source", "cache")
    return lab


def test_training_from_it_is_the_same_after_a_stop_and_with_workers(lab: Lab) -> None:
    source = ["--image_source", "cache"]
    assert f"images decoded and shrunk to {SHORTEST} pixels once" in (lab.root / "whole.log").read_text()
    lab.run(lab.root / "stopped", *source, fault="before_optim:0:7:term", expect=stop.EXIT_CODE)
    lab.run(lab.root / "stopped", *source, "--dataloader_num_workers", 2)
    assert fingerprint(lab.root / "stopped") == fingerprint(lab.root / "whole")
    assert json.loads((lab.root / "whole" / "run.json").read_text())["image_source"] == "cache"


def test_cache_absent_on_two_ranks_trains_as_one_process(lab: Lab) -> None:
    job = lab.run(lab.root / "two", "--image_source", "cache", "--cache_dir", lab.root / "other", processes=2)
    assert job.output.count(f"images decoded and shrunk to {SHORTEST} pixels once") == 1
    assert contents(lab.root / "other") == contents(lab.root / "cache")
    assert losses(lab.root / "two") == pytest.approx(losses(lab.root / "whole"), abs=1e-4)


def test_auto_goes_on_with_the_source_that_the_run_began_with(lab: Lab) -> None:
    folder = lab.root / "auto"
    lab.run(folder, fault="before_optim:0:7:term", expect=stop.EXIT_CODE)
    record = json.loads((folder / "run.json").read_text())
    assert record["image_source"] == "processor"  # on CPUs
    del record[SEAL]
    for began_with, said, code in (
        (
            "resident",
            "error: this run uses image_source=resident, which this machine does not support: image_source=resident",
            2,
        ),
        ("stream", "images streamed as bytes", 0),
    ):  # as on a GPU
        (folder / "run.json").write_text(json.dumps(seal({**record, "image_source": began_with})))
        assert said in lab.run(folder, expect=code).output
