"""Secrets stay out of what a run leaves, and what others could have put in its way is neither run nor followed."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import points
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Reference
from lab import Job, Lab, committed, fingerprint, status
from PIL import Image
from test_wandb import FakeApi
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from vit_dist import stop
from vit_dist.checkpoint import store
from vit_dist.checkpoint.load import load_model, load_optimizer
from vit_dist.data.decode import BadImage, DecodeRules, decode
from vit_dist.data.source import load_source
from vit_dist.errors import UserError
from vit_dist.files import SEAL, seal
from vit_dist.options import DataOptions
from vit_dist.redact import redact


@pytest.fixture(scope="module")
def whole(lab: Lab, reference: Reference) -> dict[str, Any]:
    """Undisturbed."""
    return fingerprint(reference(lab.args))


# Secrets

SECRETS = {  # what no message may show of each stands at its end
    "WANDB_API_KEY": "c0ffee" * 6 + "beef",
    "HF_TOKEN": "a-token-that-looks-like-none-canary1",
    "MY_SERVICE_PASSWORD": "p\"a'ss\\w&örd/%canary2",
    "OTHER_TOKEN": "a-token-that-looks-like-none-canary1-and-more-canary3",
}
CANARIES = ("c0ffeebeef", "canary1", "canary2", "canary3")


def assert_clean(*places: Path | str) -> None:
    """No canary in any byte of a file, in a name, or in a text."""
    looked = 0
    for place in places:
        files = [place] if isinstance(place, str) or place.is_file() else [p for p in place.rglob("*") if p.is_file()]
        for file in files:
            content = file.encode() if isinstance(file, str) else str(file).encode() + file.read_bytes()
            looked += len(content)
            for canary in CANARIES:
                assert canary.encode() not in content, f"{canary} in {str(file)[-2000:]}"
    assert looked > 100


def reveal() -> None:
    """Fail as libraries do, with what they were given in all the forms that messages have."""
    password, key = SECRETS["MY_SERVICE_PASSWORD"], SECRETS["WANDB_API_KEY"]
    try:
        raise KeyError(key, password)
    except KeyError as error:
        secrets = " ".join([*SECRETS.values(), json.dumps(SECRETS)])
        raise ConnectionError(f"https://me:{quote(password, safe='')}@host/{quote(password)}: {secrets}") from error


@pytest.fixture
def api() -> Iterator[FakeApi]:
    server = FakeApi()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


ENDS = {  # fault, exit code
    "finished": ("", 0),
    "failed": ("before_optim:0:22:exc", 1),
    "failed in a snapshot": ("before_snapshot:0:2:exc", 1),
    "failed in a worker": ("in_worker:0:1:exc", 1),
    "preempted": ("before_optim:0:22:term", stop.EXIT_CODE),
}


@pytest.mark.parametrize("end", ENDS)
def test_run_with_secrets_in_its_environment_writes_none(
    lab: Lab, api: FakeApi, isolated_home: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Run folder, log, caches, and what went to Weights & Biases; nor is anything pickled beside the state."""
    monkeypatch.setitem(points.ACTIONS, "exc", reveal)
    folder, (fault, code) = lab.root / end.replace(" ", "_"), ENDS[end]
    more = ["--dataloader_num_workers", 1] if "worker" in end else []
    job = lab.run(
        folder, "--report_to", "wandb", "tensorboard", *more, fault=fault, expect=code,
        WANDB_BASE_URL=f"http://127.0.0.1:{api.server_port}", **SECRETS,
    )  # fmt: skip
    assert_clean(folder, job.output, isolated_home, json.dumps([api.upserts, api.history]) + str(api.uploads))
    assert api.upserts and list(folder.glob("logs/**/events*")) and list(folder.glob("wandb/run-*"))
    assert (folder / "failure.json").exists() == (code == 1)
    if code == 1:
        told = (folder / "failure.json").read_text(), status(folder)["reason"], job.output
        assert all("ConnectionError" in text and "https://***@host/***: *** *** ***" in text for text in told)
    else:
        assert committed(folder)[-1] == (22 if code else 30)
    assert not [path for path in folder.rglob("*") if path.name in ("training_args.bin", "rng_state.pth")]


@pytest.mark.parametrize(
    "given",
    [["--hub_token", "canary1"], ["--hub_token=canary1"], ["--hub-token", "canary1"], ["--wandb_api_key", "canary1"],
     "hub_token: canary1\n", "seed: 1\nhub_token: canary1\n", "wandb_api_key: [canary1]\n"],
)  # fmt: skip
def test_secret_among_the_settings_is_refused_and_not_printed(lab: Lab, tmp_path: Path, given: Any) -> None:
    if isinstance(given, str):
        (tmp_path / "recipe.yaml").write_text(given)
        given = [tmp_path / "recipe.yaml"]
    job = Lab(tmp_path, given).run(tmp_path / "run", expect=2)
    assert_clean(job.output + " " * 100)
    assert len(job.output.strip().splitlines()) == 1 and "use the environment (HF_TOKEN, WANDB_API_KEY)" in job.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:hunter2@host/0", "redis://***@host/0"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("https://me:p@ss@host/x y@z", "https://***@host/x y@z"),
        ("Authorization: Bearer 123456.abc", "Authorization: Bearer ***"),
        ("abcdef-and-more, abcdef", "***, ***"),
        ("hf_12345678, pub", "***, pub"),
    ],
)
def test_messages_with_secrets_are_redacted(text: str, shown: str) -> None:
    environ = {"A_TOKEN": "abcdef", "B_PASSPHRASE": "abcdef-and-more\n", "C_KEY": "pub", "D_PASSWORD": ""}
    not_text = {"E_KEY": "\udcff" * 6}  # bytes in the environment that are no UTF-8
    assert redact(text, environ | not_text) == shown


# Checkpoints


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


@pytest.fixture(scope="module")
def stopped(lab: Lab) -> Path:
    """A run with two checkpoints."""
    lab.run(lab.root / "stopped", fault="before_optim:0:22:term", expect=stop.EXIT_CODE)
    assert committed(lab.root / "stopped") == [20, 22]
    return lab.root / "stopped"


def forge(checkpoint: Path, *names: str, **facts: Any) -> None:
    """A manifest that fits what lies there now."""
    manifest = store.read_manifest(checkpoint)
    manifest["files"] |= {name: store.settle(checkpoint / name) for name in names}
    del manifest[SEAL]
    (checkpoint / "manifest.json").write_text(json.dumps(seal({**manifest, **facts})))


def one_error(job: Job) -> str:
    """The last line, which is all that is said."""
    *before, line = job.output.splitlines()
    assert line.startswith("error: ") and all(line.startswith("error: ") for line in before)
    return line


@pytest.mark.parametrize("as_file", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"])
def test_malicious_pickle_in_the_newest_checkpoint_is_skipped(
    lab: Lab, whole: dict[str, Any], stopped: Path, tmp_path: Path, name: str, as_file: Callable[[Any, Path], Any]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    as_file({"state": Evil(tmp_path / "canary")}, folder / "checkpoint-22" / name)
    job = lab.run(folder)
    assert f"checkpoint-22 is passed over: {name} " in job.output and "from checkpoint-20" in job.output
    assert fingerprint(folder) == whole
    assert not (tmp_path / "canary").exists()


def test_malicious_pickles_in_all_checkpoints_refuse_the_run(lab: Lab, stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for checkpoint in store.checkpoints(folder):
        torch.save(Evil(tmp_path / "canary"), checkpoint / "optimizer.pt")
    line = one_error(lab.run(folder, expect=2))
    assert "is whole; --fresh starts over" in line and "optimizer.pt has" in line
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"])
def test_malicious_pickle_with_a_valid_manifest_is_not_run(
    lab: Lab, whole: dict[str, Any], stopped: Path, tmp_path: Path, name: str
) -> None:
    """What is loaded is loaded as tensors and numbers only; the rest is never opened."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    torch.save({"state": Evil(tmp_path / "canary")}, folder / "checkpoint-22" / name)
    forge(folder / "checkpoint-22", name)
    assert store.integrity_error(folder / "checkpoint-22") is None
    if name in ("optimizer.pt", "scheduler.pt"):
        job = lab.run(folder, expect=None)
        assert set(job.codes.values()) == {2} and status(folder)["state"] == "failed"
        assert "holds something other than weights and state" in job.output and "Traceback" not in job.output
    else:
        lab.run(folder)
        assert fingerprint(folder) == whole
    assert not (tmp_path / "canary").exists()


def test_malicious_pickle_in_fsdp_weights_is_not_run(tmp_path: Path) -> None:
    staged = store.begin(tmp_path, 5)
    torch.save({"weight": Evil(tmp_path / "canary")}, staged / "pytorch_model_fsdp.bin")
    files = {"pytorch_model_fsdp.bin": store.settle(staged / "pytorch_model_fsdp.bin")}
    checkpoint = store.commit(staged, files, {"step": 5, "layout": "fsdp_full"})
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_model(checkpoint, torch.nn.Linear(2, 2), None)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("where", ["metadata", "value"])
def test_malicious_pickle_in_a_distributed_checkpoint_is_not_run(tmp_path: Path, where: str) -> None:
    """PyTorch itself reads the metadata, and values that are no tensors, with an unpickler that calls what it finds."""
    staged, model = store.begin(tmp_path, 5), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    state = get_optimizer_state_dict(model, optimizer)
    state["param_groups"][0]["lr"] = Evil(tmp_path / "canary") if where == "value" else 0.1  # type: ignore[index]
    dcp.save({"optimizer": state}, checkpoint_id=staged / "optimizer_0", no_dist=True)
    if where == "metadata":
        (staged / "optimizer_0/.metadata").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    files = {str(p.relative_to(staged)): store.settle(p) for p in staged.rglob("*") if p.is_file()}
    checkpoint = store.commit(staged, files, {"step": 5, "layout": "fsdp_sharded"})
    with pytest.raises(pickle.UnpicklingError, match=r"not part of a checkpoint|Weights only"):
        load_optimizer(checkpoint, model, optimizer)
    assert not (tmp_path / "canary").exists()


_opened: list[str] = []
_watching = False


def _note_opened(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        _opened.append(os.path.realpath(os.fsdecode(args[0])))


sys.addaudithook(_note_opened)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every file that this process opens, by its real path."""
    global _watching
    _opened.clear()
    _watching = True
    yield _opened
    _watching = False


OUTSIDE = {
    "a name that leads out": lambda inside, outside: "../outside/file",
    "a name that leads out and back": lambda inside, outside: f"../{inside.name}/state",
    "an absolute name": lambda inside, outside: str(outside / "file"),
    "a link": lambda inside, outside: _link(inside / "file", outside / "file"),
    "a folder that is a link": lambda inside, outside: _link(inside / "part", outside) + "/file",
    "a manifest that is a link": lambda inside, outside: "manifest.json",
}


def _link(link: Path, target: Path) -> str:
    link.symlink_to(target)
    return link.name


@pytest.mark.parametrize("case", OUTSIDE)
def test_checkpoint_naming_files_outside_of_it_is_refused(tmp_path: Path, opened: list[str], case: str) -> None:
    """Though the sizes and digests are right; nothing out there is opened."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    staged = store.begin(tmp_path, 5)
    (staged / "state").write_bytes(b"x")
    facts = store.settle(staged / "state")
    checkpoint = store.commit(staged, {"state": facts}, {"step": 5})
    assert store.integrity_error(checkpoint) is None
    name = OUTSIDE[case](checkpoint, outside)
    if name == "manifest.json":
        shutil.move(checkpoint / name, outside / name)
        _link(checkpoint / name, outside / name)
    else:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest[SEAL]
        forged = seal({**manifest, "files": {"state": facts, name: facts}})
        (checkpoint / "manifest.json").write_text(json.dumps(forged))
    opened.clear()
    assert (store.integrity_error(checkpoint) or "").startswith(name.split("/file")[0] if "part" in name else name)
    assert opened or name == "manifest.json"
    assert not [path for path in opened if path.startswith(str(outside))]


@pytest.mark.parametrize(
    "files", [[], {"a": 5}, {"a": None}, {"a": {}}, {"a": {"bytes": 1}}, {"a": {"sha256": ""}}, "a", None]
)
def test_manifest_of_another_shape_is_damage(tmp_path: Path, files: Any) -> None:
    checkpoint = store.commit(store.begin(tmp_path, 5), {}, {"step": 5})
    (checkpoint / "manifest.json").write_text(json.dumps(seal({"format": store.FORMAT, "step": 5, "files": files})))
    assert store.integrity_error(checkpoint) == "manifest.json cannot be read"


def test_checkpoint_that_others_may_write_is_not_resumed(
    lab: Lab, whole: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    """Everybody's run folder is refused; everybody's checkpoint, or a file in it, is passed over. So is another's."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    folder.chmod(0o777)
    line = one_error(lab.run(folder, expect=2))
    assert "everybody may write in it" in line and f"chmod -R o-w {folder}" in line
    folder.chmod(0o755)
    (folder / "checkpoint-22/optimizer.pt").chmod(0o666)
    assert "optimizer.pt: everybody may write in it" in (store.integrity_error(folder / "checkpoint-22") or "")
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        assert "belongs to user 12345" in one_error(lab.run(folder, expect=2))
        os.chown(folder, 0, -1)
        os.chown(folder / "checkpoint-22/optimizer.pt", 12345, -1)
        assert "optimizer.pt: it belongs to user 12345" in (store.integrity_error(folder / "checkpoint-22") or "")
    job = lab.run(folder)
    assert "checkpoint-22 is passed over: optimizer.pt: " in job.output
    assert fingerprint(folder) == whole


# Data


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def tree(root: Path) -> dict[str, int]:
    """Every file and when it was last written."""
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*")}


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def test_archive_with_paths_outside_of_it_writes_nothing_there(lab: Lab, tmp_path: Path) -> None:
    """Members that would lie outside, links, and classes called like paths: a run from start to end writes its own
    folder and caches only.
    """
    shards, cache = tmp_path / "shards", tmp_path / "cache"
    shards.mkdir()
    classes = ["..", "../../outside", str(tmp_path / "outside"), "a/b"]
    prefixes = ["", "../", "../../outside/", f"{tmp_path}/outside/", "./a/../../"]
    with tarfile.open(shards / "train-0.tar", "w") as archive:
        for number in range(24):
            prefix = prefixes[number % len(prefixes)]
            add(archive, f"{prefix}{number:03}.png", png(10 * number))
            add(archive, f"{prefix}{number:03}.json", json.dumps({"label": classes[number % 4]}).encode())
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname=f"{tmp_path}/outside")
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="../outside")
    before = tree(tmp_path)
    Lab(tmp_path, ["--data", shards, *lab.args[2:], "--cache_dir", cache, "--max_steps", 2]).run(tmp_path / "run")
    after = tree(tmp_path)
    new = {Path(path).relative_to(tmp_path).parts[0] for path in after.keys() - before.keys()}
    assert new == {"run", "run.log", "cache"}
    assert {path: after[path] for path in before} == before
    assert json.loads((tmp_path / "run/classes.json").read_text())["classes"] == sorted(classes)


@pytest.mark.parametrize(
    ("column", "sample"),
    [
        ("json.file_name", {"json": {"file_name": "PATH", "label": "a"}}),
        ("json.image.path", {"json": {"image": {"bytes": None, "path": "PATH"}, "label": "a"}}),
        ("txt", {"txt": "PATH", "cls": "1"}),
    ],
)
@pytest.mark.parametrize("path", ["absolute", "../outside.png"])
def test_archive_naming_images_outside_of_it_opens_none(
    tmp_path: Path, opened: list[str], column: str, sample: dict[str, Any], path: str
) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(0))
    path = str(outside) if path == "absolute" else path
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/train-0.tar", "w") as archive:
        for row in range(4):
            for kind, value in sample.items():
                text = value if isinstance(value, str) else json.dumps(value)
                add(archive, f"{row}.{kind}", text.replace("PATH", path).encode())
    opened.clear()
    with pytest.raises(UserError, match=f"train-0.tar: column {column} has names of files"):
        load_source(
            DataOptions(data=str(tmp_path / "shards"), cache_dir=str(tmp_path / "cache"), image_column_name=column)
        )
    assert opened and str(outside) not in opened


def test_pickle_in_an_archive_is_not_run(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"state": Evil(tmp_path / "canary")}, file)
    evil = pickle.dumps(Evil(tmp_path / "canary"))
    for kind, data in {"pth": file.getvalue(), "pyd": evil, "pickle": evil, "pkl": evil, "npy": evil}.items():
        shards = tmp_path / kind
        shards.mkdir()
        with tarfile.open(shards / "train-0.tar", "w") as archive:
            for row in range(4):
                add(archive, f"{row}.png", png(row))
                add(archive, f"{row}.cls", str(row % 2).encode())
                add(archive, f"{row}.{kind}", data)
        try:
            source = load_source(DataOptions(data=str(shards), cache_dir=str(tmp_path / "cache")))
            assert len(source.tables["train"]) == 4
        except UserError as error:
            assert "cannot read" in str(error)
        assert not (tmp_path / "canary").exists()


def test_table_naming_files_that_are_no_images_shows_nothing_of_them(tmp_path: Path) -> None:
    """A list of images is the user's own, like the folders that links in an image folder lead to. What is no image is
    said to be none; its content is not repeated.
    """
    (tmp_path / "tables").mkdir()
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"images/{name}.png").write_bytes(png(ord(name)))
    (tmp_path / "images/secret.png").write_text("root:canary1:0:0")
    rows = [("../images/a.png", "a"), (tmp_path / "images/b.png", "b"), ("../images/secret.png", "..")]
    with (tmp_path / "tables/train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    source = load_source(DataOptions(data=str(tmp_path / "tables"), cache_dir=str(tmp_path / "cache")))
    images = source.tables["train"]["image"]
    assert [decode(image, DecodeRules()).getpixel((0, 0))[0] for image in images[:2]] == [ord("a"), ord("b")]
    with pytest.raises(BadImage) as caught:
        decode(images[2], DecodeRules())
    assert "canary1" not in str(caught.value)
    assert list(source.tables["train"]["id"]) == ["train.csv#0", "train.csv#1", "train.csv#2"]


def test_links_in_an_image_folder_are_followed_and_not_written_to(lab: Lab, tmp_path: Path) -> None:
    """A class folder elsewhere is the user's own arrangement; images go by their names in the data folder."""
    elsewhere, photos = tmp_path / "elsewhere", tmp_path / "photos"
    for folder in (elsewhere / "real name", photos / "cat"):
        folder.mkdir(parents=True)
        for number in range(8):
            (folder / f"{number}.png").write_bytes(png(30 * number))
    (photos / "dog").symlink_to(elsewhere / "real name")
    before = tree(elsewhere), tree(photos)
    Lab(tmp_path, ["--data", photos, *lab.args[2:], "--max_steps", 2]).run(tmp_path / "run")
    assert (tree(elsewhere), tree(photos)) == before
    assert json.loads((tmp_path / "run/classes.json").read_text())["classes"] == ["cat", "dog"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int, *before: bytes) -> bytes:
    """A PNG of one bit a pixel, all zero, deflated a row at a time: the whole of it is never in memory."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    deflate, row = zlib.compressobj(9), bytes(1 + side // 8)
    packed = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    parts = [*before, chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def icon(*pictures: bytes) -> bytes:
    """An ICO file that calls each picture 16 x 16."""
    entries, start = b"", 6 + 16 * len(pictures)
    for picture in pictures:
        entries += struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), start)
        start += len(picture)
    return struct.pack("<HHH", 0, 1, len(pictures)) + entries + b"".join(pictures)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: bomb(30_000),
    "png below twice the limit": lambda: bomb(15_000),
    "icon": lambda: icon(bomb(15_000)),
    "icon with a chunk before the header": lambda: icon(bomb(15_000, chunk(b"tEXt", b"a\0b"))),
    "icon in an icon": lambda: icon(icon(bomb(15_000))),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path, kind: str) -> None:
    """In a process of its own, whose memory does not grow by 200 MB."""
    data = BOMBS[kind]()
    assert len(data) < 150_000
    pid = os.fork()
    if pid == 0:
        said = "decoded"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            decode(data, DecodeRules())
        except BadImage as error:
            said = error.reason
        finally:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            (tmp_path / "said").write_text(json.dumps([said, grown]))
            os._exit(0)
    os.waitpid(pid, 0)
    said, grown = json.loads((tmp_path / "said").read_text())
    assert "(max_image_pixels)" in said or (kind == "icon in an icon" and said != "decoded")
    assert grown < 200


def test_icons_below_the_limit_are_decoded() -> None:
    for side in (16, 48):
        file = io.BytesIO()
        Image.new("RGB", (side, side), (1, 2, 3)).save(file, "ICO", sizes=[(side, side)], bitmap_format="bmp")
        png_inside = icon(png(7))
        assert decode(file.getvalue(), DecodeRules(max_image_pixels=side * side)).getpixel((0, 0)) == (1, 2, 3)
        assert decode(png_inside, DecodeRules()).size == (8, 8)
