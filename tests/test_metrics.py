"""The metrics, against plain numpy in float64 and scikit-learn, and their loading without a network."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch

from vit_dist import metrics
from vit_dist.errors import UserError
from vit_dist.metrics import ClassificationMetrics
from vit_dist.metrics.outcomes import SampleMetrics, sample_metrics, sample_rows

SIZES = [1, 7, 37, 41, 101]

METRIC = """
import datasets
import evaluate


class Extra(evaluate.Metric):
    def _info(self):
        ids = datasets.Value("int64")
        features = datasets.Features({{"predictions": ids, "references": ids}})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references{parameters}):
        return {result}
"""


def names(count: int) -> list[str]:
    return [f"class{i}" for i in range(count)]


def measure(logits: np.ndarray, labels: np.ndarray, **options: object) -> dict[str, float]:
    measured = ClassificationMetrics(names(logits.shape[1]), **options)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return measured(sample_metrics(logits, labels))


def sample(size: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, size, classes])
    return rng.normal(0, 5, (size, classes)).astype(np.float32), rng.integers(0, classes, size)


def write_metric(folder: Path, name: str, result: str, parameters: str = "") -> str:
    (folder / name).mkdir()
    (folder / name / f"{name}.py").write_text(METRIC.format(result=result, parameters=parameters))
    return str(folder / name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [2, 3, 10, 120])
def test_against_references(size: int, classes: int) -> None:
    logits, labels = sample(size, classes)
    wide = logits.astype(np.float64)
    ids = logits.argmax(axis=1)
    order = np.argsort(-wide, axis=1, kind="stable")[:, :5]
    losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(size), labels]
    recalls = [np.mean(ids[labels == c] == c) for c in np.unique(labels)]

    in_top5 = np.mean([label in row for label, row in zip(labels, order, strict=True)])

    result = measure(logits, labels)

    assert result.pop("samples") == size
    assert result == pytest.approx(
        {
            "accuracy": np.mean(ids == labels),
            **({"top5_accuracy": in_top5} if classes > 5 else {}),
            "f1_macro": sklearn.metrics.f1_score(labels, ids, average="macro"),
            "balanced_accuracy": np.mean(recalls),
            "loss": losses.mean(),
        },
        rel=1e-12,
    )


@pytest.mark.parametrize("size", SIZES)
def test_per_class(size: int) -> None:
    logits, labels = sample(size, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = ClassificationMetrics(names(12)).per_class(logits.argmax(axis=1), labels)
    ids = logits.argmax(axis=1)
    for c, row in enumerate(rows):
        hits, predicted, support = np.sum((ids == c) & (labels == c)), np.sum(ids == c), np.sum(labels == c)
        assert row == pytest.approx(
            {
                "class": f"class{c}",
                "precision": hits / predicted if predicted else 0,
                "recall": hits / support if support else 0,
                "f1": 2 * hits / (predicted + support) if predicted + support else 0,
                "support": support,
            }
        )
    assert [row["class"] for row in rows] == names(12) and sum(row["support"] for row in rows) == size


def test_absent_classes() -> None:
    labels = np.array([0, 0, 0, 3])
    logits = np.eye(6)[[0, 0, 5, 3]]  # class 5 is predicted and never true; 1, 2 and 4 are neither
    result = measure(logits, labels)
    assert result["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["f1_macro"] == pytest.approx((0.8 + 1 + 0) / 3)


@pytest.mark.parametrize(("classes", "reported"), [(3, False), (5, False), (6, True)])
def test_top5_is_reported_above_five_classes_only(classes: int, reported: bool) -> None:
    assert ("top5_accuracy" in measure(*sample(37, classes))) == reported


def test_ties_go_to_the_lower_class() -> None:
    logits = np.zeros((7, 7), dtype=np.float32)
    result = measure(logits, np.arange(7))
    assert result["accuracy"] == pytest.approx(1 / 7)
    assert result["top5_accuracy"] == pytest.approx(5 / 7)
    assert result["loss"] == pytest.approx(np.log(7))


def test_top5_is_never_below_accuracy() -> None:
    rng = np.random.default_rng(0)
    metric = ClassificationMetrics(names(8))
    for _ in range(50):
        logits = rng.integers(0, 3, (41, 8)).astype(np.float32)  # ties everywhere
        logits[rng.random(logits.shape) < 0.1] = np.nan
        result = metric(sample_metrics(logits, rng.integers(0, 8, 41)))
        assert result["accuracy"] <= result["top5_accuracy"]
        assert np.isnan(result["loss"])


def test_loss_is_stable_and_hides_nothing() -> None:
    labels = np.array([0, 1])
    assert measure(np.array([[1e4, -1e4], [-1e4, 1e4]]), labels)["loss"] == 0
    assert measure(np.array([[-1e4, 1e4], [-1e4, 1e4]]), labels)["loss"] == 1e4
    for bad in (np.nan, np.inf, -np.inf):
        assert np.isnan(measure(np.array([[bad, 0.0], [0.0, 1.0]]), labels)["loss"])


def test_metrics_of_many_rows_in_half_precision_are_exact() -> None:
    logits, labels = sample(2500, 7)
    wide = logits.astype(np.float64)
    losses = np.logaddexp.reduce(wide, axis=1) - wide[np.arange(2500), labels]
    assert measure(logits, labels)["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    half = logits.astype(np.float16)
    assert measure(half, labels) == measure(half.astype(np.float64), labels)


def test_results_are_plain_numbers() -> None:
    assert {type(value) for value in measure(*sample(7, 3)).values()} == {float, int}


def test_images_count_once_in_the_metrics() -> None:
    logits, labels = sample(7, 3)
    rows = sample_rows(torch.from_numpy(logits), torch.from_numpy(labels), torch.arange(7)).numpy()
    shuffled, whole = (
        SampleMetrics.of(rows[[3, 1, 6, 0, 2, 5, 4, 0, 1]], 7),
        sample_metrics(logits, labels),
    )  # two fill up a batch
    for name in ("labels", "predicted", "places", "losses"):
        assert getattr(shuffled, name).tobytes() == getattr(whole, name).tobytes()
    for wrong in (rows[:6], rows[1:], rows[[0, 1, 2, 3, 4, 5, 5]]):
        with pytest.raises(RuntimeError, match="did not see every image once"):
            SampleMetrics.of(wrong, 7)


def test_random_state_is_left_alone() -> None:
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    measure(*sample(7, 3))
    assert np.random.random() == expected


def test_extras(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = write_metric(tmp_path, "plain", '{"agree": float(sum(p == r for p, r in zip(predictions, references)))}')
    same = write_metric(tmp_path, "same", '{"accuracy": 0.125, "agree": 1, "table": [1, 2]}')
    average = write_metric(tmp_path, "average", '{"macro": average == "macro"}', parameters=', average="binary"')
    logits, labels = sample(37, 3)
    metric = ClassificationMetrics(names(3), extra=[plain, same, f"{average}/average.py"])
    with caplog.at_level(logging.WARNING, "vit_dist"):
        results = [metric(sample_metrics(logits, labels)) for _ in range(2)]
    assert results[0] == results[1]
    ours = measure(logits, labels)
    extras = {"agree": 37 * ours["accuracy"], "same_accuracy": 0.125, "same_agree": 1, "macro": 1}
    assert results[0] == pytest.approx({**ours, **extras})
    assert measure(*sample(37, 2), extra=[average])["macro"] == 0
    assert len([r for r in caplog.records if "table" in r.message]) == 1


def test_metric_that_cannot_be_computed_is_refused_at_once(tmp_path: Path) -> None:
    wants_more = write_metric(tmp_path, "wants_more", "{}", parameters=", prediction_scores")
    with pytest.raises(UserError, match=r"wants_more.*prediction_scores.*path"):
        ClassificationMetrics(names(3), extra=[wants_more])


@pytest.mark.parametrize("offline", [True, False])
def test_metric_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """Without the offline switch the hub is asked, and given up on if it does not answer."""
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(metrics, "HUB_TIMEOUT", 1.0)
        load = metrics.evaluate.load

        def slow(path: str, **options: object) -> object:
            if path == "no_such_metric" and not metrics.evaluate.config.HF_EVALUATE_OFFLINE:
                time.sleep(30)
            return load(path, **options)

        monkeypatch.setattr(metrics.evaluate, "load", slow)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'no_such_metric' cannot be loaded .* folder .* hub"):
        ClassificationMetrics(names(3), extra=["no_such_metric"])
    assert time.monotonic() - start < 8
    assert not metrics.evaluate.config.HF_EVALUATE_OFFLINE


# In a process of its own, because evaluate reads HF_HOME when it is imported. It forks, so that the three start at
# once and the imports are paid for once.
PROCESSES = """
import os
import socket
import sys
from pathlib import Path

def refuse(*args, **kwargs):
    raise SystemExit(f"tried to reach {args}")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import evaluate
import numpy as np
from vit_dist.metrics import ClassificationMetrics
from vit_dist.metrics.outcomes import sample_metrics

def check():
    metric = ClassificationMetrics(["a", "b"])
    result = metric(sample_metrics(np.eye(2), np.array([0, 1])))
    assert result["accuracy"] == 1 and metric.per_class([0, 1], [0, 1])[1]["support"] == 1

for _ in range(3):
    if not os.fork():
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
assert Path(os.environ["HF_HOME"], "modules").is_dir()

evaluate.config.HF_MODULES_CACHE = evaluate.config.HF_METRICS_CACHE = Path(sys.argv[1])
check()
"""


def test_three_processes_share_an_empty_home_and_one_has_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", PROCESSES, str(tmp_path / "file" / "home")],
        cwd=Path(__file__).parents[1],
        env={**inherited, **home},
        check=True,
        timeout=120,
    )
    assert not list(tmp_path.glob("vit_dist_metrics_*"))


def test_metric_module_damaged_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise TypeError("'NoneType' object is not callable")  # what evaluate says to a module cut short

    monkeypatch.setattr(metrics.evaluate, "load", load)
    with pytest.raises(UserError, match=r"'accuracy' of vit_dist .* delete .*evaluate_modules and try again"):
        ClassificationMetrics(names(3))


def test_ten_thousand_samples_of_a_thousand_classes_take_seconds() -> None:
    logits, labels = sample(10_000, 1_000)
    metric = ClassificationMetrics(names(1_000))
    start = time.process_time()
    metric(sample_metrics(logits, labels))
    assert time.process_time() - start < 2
