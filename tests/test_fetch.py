"""`vit-dist fetch` against a hub on this machine, and sealed runs with what it brought.

Libraries read the address of the hub when they are imported: what uses it is forked from servers that have it in their
environment. That a sealed run tries to reach nobody is shown with strace, which sees every process and library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import psutil
import pytest
from conftest import command, losses, results, run, write_checkpoint, write_photos
from hub_server import HubServer
from lab import ForkServer, fork
from test_source import hub_table

from vit_dist import bundle
from vit_dist.commands.fetch import fetch, verify
from vit_dist.errors import UserError

ARGS = ["--data", "lab/photos", "--model", "lab/vit", "--metrics", "mine"]
SHORT = ["--max_steps", 4, "--global_batch_size", 8, "--logging_steps", 1, "--dataloader_num_workers", 1]
METRIC = """
import datasets
import evaluate

class Mine(evaluate.Metric):
    def _info(self):
        features = datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64"))
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"mine": 7.0}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    write_checkpoint(root / "vit")
    (root / "vit" / "pytorch_model.bin").write_bytes(b"not to be fetched")
    (root / "photos" / "data").mkdir(parents=True)
    hub_table([0, 1, 2] * 9).to_parquet(root / "photos" / "data" / "train-00000-of-00001.parquet")
    hub_table([0, 1, 2] * 3).to_parquet(root / "photos" / "data" / "test-00000-of-00001.parquet")
    write_photos(root / "pictures", {"train": 12, "test": 6})
    (root / "mine").mkdir()
    (root / "mine" / "mine.py").write_text(METRIC)
    server = HubServer()
    server.add("models", "lab/vit", root / "vit")
    server.add("datasets", "lab/photos", root / "photos")
    server.add("datasets", "lab/pictures", root / "pictures")
    server.add("spaces", "evaluate-metric/mine", root / "mine")
    yield server
    server.released.set()
    server.close()


Bring = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def bring(hub: HubServer) -> Iterator[Bring]:
    """`vit-dist fetch` with the hub: (folder of the bundle, flags..., expect=exit code)."""
    server = ForkServer({**os.environ, **hub.environment})

    def bring(folder: Path, *args: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return server.fork("fetch", *args, "--bundle", folder, module="vit_dist.cli", expect=expect)

    yield bring
    server.close()


@pytest.fixture(scope="module")
def fetched(bring: Bring, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "photos"
    done = bring(folder, *ARGS)
    assert done.stdout.splitlines()[0].startswith(f"{folder}: data lab/photos, model lab/vit, metrics mine; ")
    assert done.stdout.splitlines()[1:] == [f"run with it: VIT_DIST_BUNDLE={folder}"]
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of everything below, folders too: nothing is written or removed without a trace."""
    found = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def test_fetch_downloads_each_file_once_and_nothing_else(hub: HubServer, fetched: Path) -> None:
    parquet = {f"datasets/lab/photos/data/{split}-00000-of-00001.parquet" for split in ("train", "test")}
    model = {f"models/lab/vit/{name}" for name in ("config.json", "preprocessor_config.json", "model.safetensors")}
    assert dict(hub.downloads) == dict.fromkeys([*parquet, *model, "spaces/evaluate-metric/mine/mine.py"], 1)
    assert {path.name for path in fetched.iterdir()} == {"manifest.json", "hf", "data"}
    assert {path.name for path in fetched.parent.iterdir()} == {fetched.name, ".photos.lock"}


def test_bundle_manifest_lists_its_files(hub: HubServer, fetched: Path) -> None:
    manifest = bundle.read(fetched)
    assert manifest["data"]["commit"] == hub.commit("datasets/lab/photos")
    assert manifest["model"]["commit"] == hub.commit("models/lab/vit")
    assert (manifest["data"]["name"], manifest["model"]["name"]) == ("lab/photos", "lab/vit")
    assert manifest["metrics"] == ["mine"] and manifest["versions"]["datasets"] == datasets.__version__
    files = {path.relative_to(fetched).as_posix() for path in fetched.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}
    for name, facts in manifest["files"].items():
        data = (fetched / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_fetch_of_a_whole_bundle_does_nothing(hub: HubServer, bring: Bring, fetched: Path) -> None:
    before, downloads = contents(fetched), hub.downloads.copy()
    done = bring(fetched, *ARGS)
    assert done.stdout.splitlines()[0] == f"{fetched}: whole, and the hub has nothing newer; nothing to do"
    assert (contents(fetched), hub.downloads) == (before, downloads)


def test_bundle_with_one_bit_changed_is_refused(fetched: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fetched, tmp_path / "copy", symlinks=True)
    verify(copy)
    name = "data/test/data-00000-of-00001.arrow"
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"copy: {re.escape(name)} was changed; 1 in all; delete the folder"):
        verify(copy)
    failed = fork("fetch", "--verify", copy, module="vit_dist.cli", expect=2)
    assert failed.stderr.startswith("error: ") and len(failed.stderr.splitlines()) == 1


def test_bundle_changed_on_the_hub_or_damaged_is_fetched_anew(hub: HubServer, bring: Bring, tmp_path: Path) -> None:
    changing = shutil.copytree(hub.repositories["models/lab/vit"], tmp_path / "changing")
    hub.add("models", "lab/changing", changing)
    args, folder = ["--data", "digits", "--model", "lab/changing"], tmp_path / "b"
    bring(folder, *args)
    first = bundle.read(folder)["model"]["commit"]
    (changing / "config.json").write_text((changing / "config.json").read_text() + "\n")
    bring(folder, *args)
    assert bundle.read(folder)["model"]["commit"] == hub.commit("models/lab/changing") != first
    (weights,) = folder.rglob("model.safetensors")
    weights.resolve().write_bytes(b"short")
    bring(folder, *args)
    verify(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"changing", "b", ".b.lock"}


@pytest.mark.launch
def test_fetch_killed_leaves_no_bundle_and_goes_on_with_what_it_had(
    hub: HubServer, bring: Bring, tmp_path: Path
) -> None:
    folder, before = tmp_path / "b", hub.downloads.copy()
    hub.held = "datasets/lab/photos/data/test-00000-of-00001.parquet"
    arguments = command("python", 1, "fetch", *ARGS, "--bundle", folder, module="vit_dist.cli")
    process = subprocess.Popen(arguments, env={**os.environ, **hub.environment}, stdout=-3, stderr=-3)
    try:
        assert hub.reached.wait(300)
        busy = bring(folder, *ARGS, expect=2)
        assert busy.stderr == f"error: another vit-dist fetch is making {folder}; wait for it\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        hub.held = ""
        hub.released.set()
    assert not folder.exists()
    bring(folder, *ARGS)
    verify(folder)
    assert hub.downloads["models/lab/vit/model.safetensors"] == before["models/lab/vit/model.safetensors"] + 1
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".b.lock"}


def test_fetch_of_local_files_names_them_and_copies_nothing(
    tmp_path: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = fork("fetch", "digits", "--data", photos, "--model", checkpoint, module="vit_dist.cli")
    folder = tmp_path / "bundles" / "digits"  # of the recipe
    assert done.stdout.splitlines() == [
        f"{folder}: nothing is needed from the hub; 0 files, 0.0 MB",
        f"not copied, the nodes must see it: {photos}",
        f"not copied, the nodes must see it: {checkpoint}",
        f"run with it: VIT_DIST_BUNDLE={folder}",
    ]
    assert bundle.read(folder)["not_copied"] == [str(photos), str(checkpoint)]
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "lab/photos", "--model", "tiny"], "HF_HUB_OFFLINE is set, and fetch needs the Hugging Face hub"),
        (["--data", "digits", "--model", "lab/vit"], "HF_HUB_OFFLINE is set, and fetch needs the Hugging Face hub"),
        (["--data", "/not/there", "--model", "tiny"], "/not/there: there is no such file or folder"),
        (["--verify", "/not/there"], "the bundle /not/there does not exist on this machine"),
        (["--bundel", "b"], "unknown argument --bundel"),
    ],
)
def test_fetch_that_cannot_work_is_refused_in_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch([*args, *([] if "--verify" in args else ["--bundle", str(tmp_path / "b")])])
    assert not list(tmp_path.iterdir())


def test_fetch_into_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("")
    with pytest.raises(UserError, match="is there already and is no bundle; choose another one with --bundle"):
        fetch(["--data", "digits", "--model", "tiny", "--bundle", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_fetch_in_a_sealed_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bundle.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"VIT_DIST_BUNDLE is set, .* unset it for fetch"):
        fetch(ARGS)


@pytest.mark.launch
def test_fetch_from_a_silent_hub_or_of_pickles_is_refused_in_one_line(
    hub: HubServer, bring: Bring, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nobody = {**hub.environment, "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    failed = run("fetch", *ARGS, "--bundle", tmp_path / "b", module="vit_dist.cli", expect=2, **nobody)
    assert failed.stderr.startswith("error: the hub cannot be reached from this machine (http://127.0.0.1:")
    assert not list(tmp_path.iterdir())
    pickled = shutil.copytree(hub.repositories["models/lab/vit"], tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    hub.add("models", "lab/pickled", pickled)
    failed = bring(tmp_path / "b", "--data", "digits", "--model", "lab/pickled", expect=2)
    assert failed.stderr == ("error: model lab/pickled: no safetensors weights there; pickled weights are not loaded\n")
    assert not (tmp_path / "b").exists()


def test_fetch_of_sharded_weights_and_image_files_brings_all_of_them(
    hub: HubServer, bring: Bring, tmp_path: Path
) -> None:
    """Pictures are in the bundle themselves: `datasets` would keep paths into the cache of the machine that fetched."""
    from transformers import ViTForImageClassification

    whole = hub.repositories["models/lab/vit"]
    sharded = shutil.copytree(whole, tmp_path / "sharded", ignore=shutil.ignore_patterns("model.safetensors"))
    ViTForImageClassification.from_pretrained(whole).save_pretrained(sharded, max_shard_size="40KB")
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 1
    hub.add("models", "lab/sharded", sharded)
    bring(tmp_path / "b", "--data", "lab/pictures", "--model", "lab/sharded")
    moved = (tmp_path / "b").rename(tmp_path / "moved")
    assert {path.name for path in moved.rglob("*.safetensors*")} == {*shards, "model.safetensors.index.json"}
    table = datasets.load_from_disk(str(moved / bundle.DATA))["train"].cast_column(
        "image", datasets.Image(decode=False)
    )
    root = hub.repositories["datasets/lab/pictures"] / "train"
    assert {row["bytes"] for row in table["image"]} == {path.read_bytes() for path in root.rglob("*.png")}


# Runs.


@pytest.fixture(scope="module")
def online(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that start with empty caches and a hub. What they downloaded is in downloads.json."""
    root = tmp_path_factory.mktemp("online")
    before = hub.downloads.copy()
    server = ForkServer({**os.environ, **hub.environment, "HF_HOME": str(root / "home")})
    server.fork(*ARGS, *SHORT, "--output_dir", root / "run", "--report_to", "none", "--per_device_train_batch_size", 4,
                processes=2)  # fmt: skip
    server.close()
    (root / "downloads.json").write_text(json.dumps(hub.downloads - before))
    return root


def test_run_on_two_processes_downloads_each_file_once(online: Path) -> None:
    downloads = json.loads((online / "downloads.json").read_text())
    downloads.pop("spaces/evaluate-metric/mine/mine.py")  # 1 KB; evaluate's lock does not keep the second from it
    assert set(downloads.values()) == {1} and len(downloads) == 5, downloads


SEALED = {  # launcher, processes, what reports
    "python": ("python", 1, "none"),
    "torchrun": ("torchrun", 2, "wandb"),
}


def sealed_environment(bundled: Path, home: Path) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    return {**environ, bundle.VARIABLE: str(bundled), "HF_HOME": str(home), "WANDB_API_KEY": "c0ffee" * 6 + "beef"}


def assert_like_online(folder: Path, online: Path, printed: str, report_to: str) -> None:
    record, other = (json.loads((path / "run.json").read_text()) for path in (folder, online))
    assert record["data"] == other["data"]
    assert losses(folder) == pytest.approx(losses(online), abs=1e-5)
    assert results(folder)["eval_mine"] == 7.0
    if report_to == "wandb":
        assert "W&B: offline (WANDB_MODE=offline)" in printed
        assert len(list(folder.glob("wandb/offline-run-*"))) == 1


def test_sealed_run_equals_the_online_run_and_changes_nothing_in_the_bundle(
    fetched: Path, online: Path, tmp_path: Path
) -> None:
    before, server = contents(fetched), ForkServer(sealed_environment(fetched, tmp_path / "home"))
    args = [*ARGS, *SHORT, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "run"]
    done = server.fork(*args, "--report_to", "wandb")
    server.close()
    assert contents(fetched) == before
    assert_like_online(tmp_path / "run", online / "run", done.stdout, "wandb")


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("name", SEALED)
def test_sealed_run_under_strace_reaches_nobody(fetched: Path, online: Path, tmp_path: Path, name: str) -> None:
    launcher, processes, report_to = SEALED[name]
    before = contents(fetched)
    args = [*ARGS, *SHORT, "--output_dir", tmp_path / "run", "--report_to", report_to]
    args += ["--per_device_train_batch_size", 8 // processes]
    # Under strace a run with data loading processes stood still once, at the end of an epoch.
    args += ["--dataloader_num_workers", 0, "--hang_timeout", "90s"]
    strace = ["strace", "-f", "--seccomp-bpf", "-q", "-s", "256", "-o", str(tmp_path / "trace")]
    strace += ["-e", "trace=connect,sendto,sendmsg,sendmmsg"]
    done = subprocess.run(
        [*strace, *command(launcher, processes, *args)],
        env=sealed_environment(fetched, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    calls = (tmp_path / "trace").read_text().splitlines()
    assert sum(call.endswith("+++ exited with 0 +++") for call in calls) >= processes  # so that silence says something
    assert not list(outside(calls))
    assert contents(fetched) == before
    assert_like_online(tmp_path / "run", online / "run", done.stdout, report_to)


def outside(calls: list[str]) -> Iterator[str]:
    """System calls that would reach another machine.

    One kind is left: PyTorch's store asks the resolver, for its log, what the peers' own addresses are called.
    """
    own = {address.address for card in psutil.net_if_addrs().values() for address in card}
    asking: dict[tuple[str, str], str] = {}  # (thread, socket) -> its connection to a name server
    for call in calls:
        thread, what = call.split(None, 1)
        descriptor = what.partition("(")[2].split(",")[0]
        if (lookup := asking.pop((thread, descriptor), None)) and not re.search(
            r"127\\7in-addr\\4arpa|ip6\\4arpa", what
        ):
            yield f"{lookup} {what}"
        for address in re.findall(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', what):
            host = "".join(address).removeprefix("::ffff:")
            if what.startswith("connect(") and re.search(r"htons\(53\)", what):
                asking[thread, descriptor] = what
            elif not host.startswith("127.") and host != "::1" and host not in own:
                yield what
    yield from asking.values()


def test_system_calls_to_other_machines_count_as_outside() -> None:
    dns = '7 connect(4, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("10.0.0.2")}, 16) = 0'
    own = r'7 sendto(4, "\1\0\0011\0010\0010\003127\7in-addr\4arpa\0", 40, MSG_NOSIGNAL, NULL, 0) = 40'
    name = r'7 sendmmsg(4, [{msg_hdr={msg_iov=[{iov_base="\1\0\7api\5wandb\2ai\0"}]}}], 2, 0) = 2'
    local = [
        '7 connect(3, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = 0',
        '7 connect(3, {sa_family=AF_INET, sin_port=htons(29500), sin_addr=inet_addr("127.0.0.1")}, 16) = 0',
        '7 connect(3, {sa_family=AF_INET6, sin6_port=htons(1), inet_pton(AF_INET6, "::1", &sin6_addr)}, 28) = 0',
        "7 sendto(8, [{nlmsg_len=20}], 20, 0, {sa_family=AF_NETLINK, nl_pid=0, nl_groups=00000000}, 12) = 20",
        dns,
        own,
    ]
    assert not list(outside(local))
    web = '7 connect(3, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("18.0.0.1")}, 16 <unfinished ...>'
    udp = '7 sendto(3, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("18.0.0.1")}, 16) = 1'
    for calls in ([web], [udp], [dns, name], [dns]):
        assert len(list(outside([*local, *calls]))) == 1, calls
