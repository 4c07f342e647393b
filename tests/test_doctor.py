"""`vit-dist doctor`: what it finds, on which rank, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run, write_photos
from fork_ranks import fork_ranks
from image_fixtures import image_folder, png
from lab import fork
from torch.multiprocessing import ProcessExitedException

from vit_dist import distributed
from vit_dist.commands import checks, doctor
from vit_dist.commands.checks import Job, Process, Result
from vit_dist.commands.doctor import merged
from vit_dist.config import load_config
from vit_dist.errors import UserError
from vit_dist.launch import start
from vit_dist.launch.gpus import Gpus

CHECKS = [
    "launch", "strategy", "precision", "versions", "code", "model", "data", "/dev/shm", "open files", "cores", "disk",
    "W&B", "GPU memory", "run folder", "all-reduce",
]  # fmt: skip
BOTH = r"rank 0 \([^)]+\), rank 1 \([^)]+\)"


def lines(output: str) -> dict[str, tuple[str, str]]:
    """Check -> (status, what is said), in the order printed."""
    found = re.findall(r"^(ok|warn|skip|FAIL) +([^:\n]+): (.*)$", output, re.M)
    return {name: (status, text) for status, name, text in found}


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module")
def healthy(photos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A launch with nothing wrong on two processes: where it ran, and what it printed."""
    root = tmp_path_factory.mktemp("healthy")
    begun = time.monotonic()
    done = run(
        "--data", photos, "--model", checkpoint, "--output_dir", root / "runs" / "one", "--report_to", "none",
        "--dataloader_num_workers", 1, launcher="torchrun", processes=2, module="vit_dist.commands.doctor",
    )  # fmt: skip
    sys.stdout.write(f"doctor on two processes: {time.monotonic() - begun:.1f} s\n")
    return root, done.stdout


@pytest.mark.launch
def test_doctor_on_a_healthy_machine_passes_every_check(healthy: tuple[Path, str]) -> None:
    found = lines(healthy[1])
    assert list(found) == CHECKS, healthy[1]
    bad = {name: line for name, line in found.items() if line[0] not in ("ok", "skip")}
    assert not bad and "nothing is wrong" in healthy[1]
    assert found["strategy"] == ("ok", "ddp") and "world size 2" in found["launch"][1]
    assert found["data"][1].startswith("61 images (train 37, validation 13, test 11), 3 classes, fingerprint ")
    assert found["model"][1].endswith("in this folder") and found["W&B"][0] == "skip"
    assert re.search(r"16 MiB in .* ms, bus bandwidth \d+\.\d\d GB/s", found["all-reduce"][1])
    assert "shared by all ranks" in found["run folder"][1]


@pytest.mark.launch
def test_doctor_prints_a_row_for_each_rank(healthy: tuple[Path, str]) -> None:
    head, *rows = healthy[1].splitlines()[:3]
    assert head.split() == ["rank", "host", "device", "driver", "python", "torch", "transformers", "accelerate",
                            "deepspeed"]  # fmt: skip
    assert [row.split()[:1] + row.split()[2:4] for row in rows] == [["0", "cpu", "-"], ["1", "cpu", "-"]]
    assert rows[0].split()[5] == torch.__version__
    assert [m.start() for m in re.finditer(r"\S+", rows[0])] == [m.start() for m in re.finditer(r"\S+", head)]


@pytest.mark.launch
def test_doctor_leaves_no_files(healthy: tuple[Path, str]) -> None:
    assert files_below(healthy[0]) == set()


def test_doctor_without_network_names_what_is_missing_with_its_ranks(tmp_path: Path) -> None:
    """No network, a hub model and a hub data set that were never downloaded, a file where a folder is needed."""
    (tmp_path / "file").write_text("")
    done = fork(
        "--data", "someone/flowers", "--model", "someone/vit", "--output_dir", tmp_path / "file" / "run",
        processes=2, module="vit_dist.commands.doctor", expect=1, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    found = lines(done.stdout)
    assert list(found) == CHECKS, done.stdout
    assert {name for name, (status, _) in found.items() if status == "FAIL"} == {"model", "data", "run folder"}
    assert re.match(f"{BOTH}: someone/vit is not in the cache .*model.safetensors", found["model"][1])
    assert "HF_HUB_OFFLINE is set" in found["model"][1] and "`hf download someone/vit`" in found["model"][1]
    assert "`hf download someone/flowers --repo-type dataset --local-dir FOLDER`" in found["data"][1]
    assert re.match(f"{BOTH}: {tmp_path / 'file'} is a file", found["run folder"][1])
    assert found["all-reduce"][0] == "ok", "the other checks go on"
    assert "3 failed" in done.stdout and "Traceback" not in done.stdout
    assert files_below(tmp_path) == {tmp_path / "file"}


def test_doctor_with_missing_data_folder_fails_the_data_check(tmp_path: Path) -> None:
    done = fork(
        "doctor", "--data", tmp_path / "nope", "--model", "tiny", "--output_dir", tmp_path / "run",
        module="vit_dist.cli", expect=1,
    )  # fmt: skip
    assert lines(done.stdout)["data"] == ("FAIL", f"--data {tmp_path / 'nope'}: there is no such file or folder")
    assert lines(done.stdout)["all-reduce"] == ("skip", "one process") and done.stderr == ""
    assert files_below(tmp_path) == set()


def doctor_on(root: Path, *flags: object, expect: int = 0) -> tuple[dict[str, tuple[str, str]], str]:
    """What `vit-dist doctor` finds for the data in a folder: its lines by check, and all of its output."""
    done = fork("doctor", "--data", root, "--model", "tiny", *flags, module="vit_dist.cli", expect=expect)
    return lines(done.stdout), done.stdout


def test_doctor_reports_an_image_that_does_not_decode_as_train_does(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data", {"a": 12, "b": 12})
    (root / "a" / "3.png").write_bytes((root / "a" / "3.png").read_bytes()[:40])
    found, output = doctor_on(root, "--output_dir", tmp_path / "run", expect=1)
    assert found["data"][0] == "FAIL" and "do not decode" in found["data"][1] and "a/3.png" in found["data"][1]
    train = fork("train", "--data", root, "--model", "tiny", "--output_dir", tmp_path / "run", module="vit_dist.cli",
                 expect=2)  # fmt: skip
    assert "do not decode" in train.stderr and "nothing is wrong" not in output


def test_doctor_warns_of_images_in_two_splits_and_prints_each_data_line_on_its_own(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data", {"train/a": 8, "train/b": 8, "test/a": 4, "test/b": 4})
    shutil.copy(root / "train/a/0.png", root / "test/a/copy.png")
    found, output = doctor_on(root, "--output_dir", tmp_path / "run")
    assert found["data"][0] == "warn" and "in validation or test and in another split too: 1" in found["data"][1]
    assert "\\n" not in output and "\n      2 classes; train " in output and "1 to look at" in output


def test_doctor_beside_a_run_with_other_settings_checks_the_folder_that_train_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = image_folder(tmp_path / "data", {"a": 12, "b": 12})
    train = ("train", "--data", root, "--model", "tiny", "--max_steps", 1, "--report_to", "none")
    fork(*train, module="vit_dist.cli")
    found, _ = doctor_on(root, "--max_steps", 2)
    status, text = found["run folder"]
    assert status == "ok" and text.startswith("runs/data-2 can be written; runs/data holds a run with other settings")
    assert found["disk"][1].endswith("runs/data-2") and not (tmp_path / "runs/data-2").exists()
    found, _ = doctor_on(root, "--max_steps", 1)
    assert found["run folder"][1].startswith("runs/data can be written; it holds runs/data: complete, eval accuracy")


def test_doctor_with_unknown_argument_prints_one_line_and_exits_2() -> None:
    failed = fork("doctor", "--learnin_rate", "1", module="vit_dist.cli", expect=2)
    assert failed.stderr == "error: unknown argument --learnin_rate; did you mean --learning_rate?\n"


def test_doctor_help_is_short_and_refers_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert "vit-dist train --help" in (text := capsys.readouterr().out) and len(text.splitlines()) < 20


def test_doctor_on_several_gpus_starts_a_process_each() -> None:
    launch = start.of_this_machine("vit_dist.commands.doctor", ["cifar10"], Gpus(4))
    assert (
        launch is not None and launch.command[-2:] == ["vit_dist.commands.doctor", "cifar10"] and "4" in launch.command
    )


def ill(rank: int, world_size: int, root: str) -> None:
    """Nothing is as it should be on rank 1: other data, another version, a folder of its own, a wrong sum, a bug."""
    if rank == 1:
        version, add_up = doctor._version, distributed.add_up
        doctor._version = lambda package: "0.1" if package == "torch" else version(package)  # type: ignore[assignment]
        distributed.add_up = lambda tensor: (add_up(tensor), tensor.add_(1))  # type: ignore
        checks.resource = SimpleNamespace(RLIMIT_NOFILE=7, RLIM_INFINITY=-1, getrlimit=lambda what: 1 / 0)  # type: ignore
    (here := Path(root, str(rank))).mkdir()
    with Path(root, f"{rank}.out").open("w") as out, contextlib.redirect_stdout(out):
        code = doctor.main(["--data", f"{root}/photos{rank}", "--model", "tiny", "--output_dir", f"{here}/runs/a"])
    Path(root, f"{rank}.json").write_text(json.dumps([code, [str(path) for path in here.rglob("*")]]))


def test_doctor_with_ranks_that_differ_names_them(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos0")
    write_photos(tmp_path / "photos1", {"train": 36, "validation": 13, "test": 11})
    (tmp_path / "photos1" / "train" / "fly").mkdir()
    shutil.copy(photos / "train" / "cat" / "0.png", tmp_path / "photos1" / "train" / "fly")
    fork_ranks(ill, 2, str(tmp_path))
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[1, []], [1, []]]
    assert (tmp_path / "1.out").read_text() == "", "rank 0 speaks"
    output = (tmp_path / "0.out").read_text()
    failures = re.findall(r"^FAIL +(.*)$", output, re.M)
    one, two = r"rank 0 \([^)]+\)", r"rank 1 \([^)]+\)"
    wanted = [
        rf"versions: torch differs: {re.escape(torch.__version__)} on {one}, 0.1 on {two}; install the same",
        rf"data: fingerprint differs: \w{{12}} on {one}, \w{{12}} on {two}; all hosts must see the same files",
        rf"data: list of classes differs: 3 \(\w+\) on {one}, 4 \(\w+\) on {two}; all hosts",
        rf"open files: {two}: ZeroDivisionError: division by zero",
        rf"run folder: {two}: rank 0's file does not appear in {tmp_path}/1; choose an --output_dir that all hosts",
        rf"all-reduce: {two}: the sum of 1 to 2 is not 3 here",
    ]
    assert len(failures) == len(wanted), output
    for failure, pattern in zip(failures, wanted, strict=True):
        assert re.match(pattern, failure)


def slow(rank: int, world_size: int, root: str) -> None:
    """Rank 1 does not come to a collective in time."""

    def data(job: Any) -> None:
        if rank == 1:
            time.sleep(120)
        doctor.PATIENCE = 3  # from here on: the start may take longer on a busy machine

    checks.LOCAL["data"] = data
    with Path(root, f"{rank}.err").open("w") as out, contextlib.redirect_stderr(out):
        doctor.main(["--model", "tiny", "--output_dir", f"{root}/run"])


def test_doctor_with_an_absent_rank_ends_and_says_so(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ProcessExitedException, match="process 0 terminated with exit code 1"):
        fork_ranks(slow, 2, str(tmp_path))
    assert time.monotonic() - begun < 60
    assert re.match(
        r"FAIL  model, data, .*: rank 0 \(.*\) waited 3 s for the others;", (tmp_path / "0.err").read_text()
    )


def test_doctor_lines_name_rank_and_host() -> None:
    hosts = ["a", "a", "b"]
    fine, full = Result("ok", "fine"), Result("FAIL", "full; make room")
    assert merged({0: fine, 1: fine, 2: fine}, hosts) == [("ok", "fine")]
    assert merged({0: fine, 1: fine, 2: full}, hosts) == [("FAIL", "rank 2 (b): full; make room")]
    assert merged({0: full}, ["a"]) == [("FAIL", "full; make room")]
    many = merged(dict.fromkeys(range(10), full), ["c"] * 10)
    assert many[0][1].startswith("rank 0 (c), rank 1 (c)") and "rank 7 (c) and 2 more: full" in many[0][1]
    same = {rank: Result("ok", "x", {"code": code}, "install") for rank, code in enumerate("112")}
    assert merged(same, hosts) == [("FAIL", "code differs: 1 on rank 0 (a), rank 1 (a), 2 on rank 2 (b); install")]


def job(*flags: object, workers: int = 0, processes: int = 1, **args: Any) -> Any:
    config = load_config(["--model", "tiny", "--output_dir", "runs/x", *map(str, flags)])
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "dataloader_prefetch_factor": None}
    one = Process(socket.gethostname(), "cpu", "-", {}, frozenset({0, 1}), workers)
    other = Process("elsewhere", "cpu", "-", {}, frozenset({5}), 99)
    made = SimpleNamespace(process_index=0, world_size=processes, device=torch.device("cpu"), **sizes, **args)
    return Job(config, made, [one] * processes + [other], Result("ok", "ddp"))


def test_limits_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_cores(job(workers=1, processes=2)).status == "ok"
    crowded = checks.check_cores(job(workers=4, processes=2))
    assert crowded.status == "warn" and "2 for 2 processes with 8 workers" in crowded.detail
    assert "pass --dataloader_num_workers 0" in crowded.detail
    assert checks.check_cores(job(processes=3)).status == "warn"

    assert checks.check_shm(job()).status == "skip"
    for free, status in ((64, "FAIL"), (300, "warn"), (4000, "ok")):  # 64 MiB is what Docker gives
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free * 2**20))
        found = checks.check_shm(job(workers=8, processes=2))
        assert found.status == status and ("--shm-size" in found.detail) == (status != "ok")
    need = 8 * 3 * 8 * 3 * 224**2  # workers, batches of each, images, bytes
    for flags, floats in ((["--image_source", "stream"], 1), (["--image_source", "processor"], 4), ([], 4)):
        assert f"about {need * floats / 2**20:,.0f} MiB" in checks.check_shm(job(*flags, workers=8)).detail, flags
    on_gpu = job(workers=8)
    on_gpu.args.device = torch.device("cuda")
    assert f"about {need / 2**20:,.0f} MiB" in checks.check_shm(on_gpu).detail
    for free, status in ((0.5, "FAIL"), (5, "warn"), (50, "ok")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free * 2**30))
        found = checks.check_disk(job())
        assert found is not None and found.status == status

    for limit, status in ((128, "FAIL"), (1024, "warn"), (65536, "ok"), (-1, "ok")):
        monkeypatch.setattr(checks.resource, "getrlimit", lambda what, limit=limit: (limit, limit))
        assert checks.check_files(job()).status == status


def test_memory_that_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_memory(torch.device("cpu")).status == "skip"
    for free, status in ((79, "ok"), (60, "warn")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 80 * 2**30))
        assert checks.check_memory(torch.device("cuda:1")).status == status


def cached(cache: Path, *names: str) -> None:
    """A model in the layout of the hub's cache."""
    folder = cache / "models--someone--vit"
    for path in [folder / "refs" / "main", *(folder / "snapshots" / "c0ffee" / name for name in names)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "c0ffee" if path.name == "main" else '{"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}'
        )


def test_doctor_with_a_model_in_the_cache_accepts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub = job("--model", "someone/vit", "--cache_dir", tmp_path)
    with pytest.raises(UserError, match=r"no config.json, preprocessor_config.json, model.safetensors\)"):
        checks.check_model(hub.config)
    cached(tmp_path, "config.json", "preprocessor_config.json", "model.safetensors.index.json", "1.safetensors")
    with pytest.raises(UserError, match=rf"\(no 2.safetensors\).*hf download someone/vit --cache-dir {tmp_path}`"):
        checks.check_model(hub.config)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # restored: the check changes it
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)
    assert checks.check_model(hub.config).status == "warn"
    cached(tmp_path, "2.safetensors")
    assert checks.check_model(hub.config) == Result("ok", "someone/vit, in the cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"lacks config.json, .*save_pretrained"):
        checks.check_model(job("--model", tmp_path / "empty").config)


def test_doctor_with_a_hub_data_set_looks_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, Features, Image
    from datasets.packaged_modules.parquet.parquet import Parquet
    from huggingface_hub import HfApi

    hub = job("--data", "someone/bugs", "--cache_dir", tmp_path / "cache")
    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **kwargs: SimpleNamespace(sha="d" * 40))
    assert checks.check_data(hub).status == "warn", "there is a network, and nothing is downloaded yet"
    rows = Dataset.from_dict({"image": [{"bytes": png(i), "path": None} for i in range(24)], "label": list("aabb" * 6)})
    rows.cast(Features({**rows.features, "image": Image(decode=False)})).to_parquet(tmp_path / "rows.parquet")
    store = tmp_path / "cache" / "datasets"
    builder = Parquet(
        cache_dir=str(store), dataset_name="bugs", hash="d" * 40, data_files={"train": str(tmp_path / "rows.parquet")}
    )
    builder.download_and_prepare()
    (made,) = store.glob(f"bugs/*/0.0.0/{'d' * 40}")
    shutil.copytree(made, store / "someone___bugs" / "default" / "0.0.0" / ("d" * 40))
    found = checks.check_data(hub)
    assert found.status == "ok" and found.detail.startswith("24 images") and "2 classes" in found.detail


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*flags: str, **environ: str) -> Result:
        with monkeypatch.context() as patch:
            for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
                patch.delenv(name, raising=False)
            for name, value in environ.items():
                patch.setenv(name, value)
            found = checks.check_wandb(job(*flags))
        assert found is not None
        return found

    assert check() == Result("skip", "not logged in; `wandb login` turns it on")
    assert check("--report_to", "none").status == "skip"
    asked = ("--report_to", "wandb")
    assert check(*asked).status == "warn" and "wandb login" in check(*asked).detail
    assert check(*asked, WANDB_MODE="offline").status == "ok"
    assert check(*asked, WANDB_MODE="disabled").status == "warn"
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    assert "no answer from 127.0.0.1" in check(**key).detail
    monkeypatch.setattr("vit_dist.callbacks.wandb.unreachable", lambda url: None)
    assert check(**key) == Result("ok", "logged in, http://127.0.0.1:9 answers")


def test_doctor_with_a_folder_that_is_no_run_fails_the_run_folder_check(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    found = doctor.check_run_folder(job("--output_dir", tmp_path))
    assert found.status == "FAIL" and "is not empty and not a run folder" in found.detail
    assert files_below(tmp_path) == {tmp_path / "thesis.txt"}


@pytest.mark.launch
def test_help_of_the_verbs_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vit_dist.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "doctor" in done.stdout and " torch" not in done.stderr and " transformers" not in done.stderr
