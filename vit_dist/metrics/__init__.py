"""What is measured on every evaluation: metric modules shipped in `modules/`, loaded with `evaluate`, offline."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np

from vit_dist import bundle
from vit_dist.errors import UserError, first_line
from vit_dist.metrics.outcomes import SampleMetrics

logger = logging.getLogger("vit_dist")

MODULES = Path(__file__).parent / "modules"
SHIPPED = ("accuracy", "f1", "balanced_accuracy", "per_class")
HUB_TIMEOUT = 15.0  # seconds; without a deadline an unreachable hub takes minutes to give up on


class ClassificationMetrics:
    """Metrics of single-label classification over a whole split.

    `classes` are the names of the C classes in id order. `extra` names further `evaluate` metrics, each by hub
    name or by path; they get the predicted and the true class ids, and `average="macro"` where they take an
    average and there are more than two classes. Raises `UserError` for an extra that cannot be loaded or that
    class ids are not enough for.
    """

    def __init__(self, classes: list[str], extra: Sequence[str] = ()):
        self.classes = classes
        _writable_cache()
        self._shipped = {name: _load_shipped(name) for name in SHIPPED}
        self._extra = {name: _load_extra(name) for name in extra}
        self._dropped: set[str] = set()
        self._try_extras()

    def __call__(self, outcomes: SampleMetrics) -> dict[str, float]:
        """Scalars: accuracy, top5_accuracy, f1_macro, balanced_accuracy, loss, samples and the extras'.

        `loss` is in nats and exact, whatever the batches were; `samples` is the number of images. `top5_accuracy` only
        for more than five classes: it is 1 for fewer.
        """
        ids = {"predictions": outcomes.predicted, "references": outcomes.labels}
        results: dict[str, float] = {}
        for name in ("accuracy", "f1", "balanced_accuracy"):
            results |= self._shipped[name].compute(**ids)
        if len(self.classes) > 5:
            results["top5_accuracy"] = float(np.mean(outcomes.places < 5))
        results["loss"] = float(np.mean(outcomes.losses))
        results["samples"] = len(outcomes.labels)
        for name in self._extra:
            results |= self._compute_extra(name, ids, taken=results)
        return results

    def per_class(self, predicted: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
        """One entry per class, in id order: class, precision, recall, f1, support (its number of samples)."""
        result = self._shipped["per_class"].compute(predictions=predicted, references=labels, classes=self.classes)
        return [{"class": name, **values} for name, values in result["per_class"].items()]

    def _compute_extra(self, name: str, ids: dict[str, np.ndarray], taken: dict[str, float]) -> dict[str, float]:
        metric = self._extra[name]
        macro = len(self.classes) > 2 and "average" in inspect.signature(metric._compute).parameters
        values = metric.compute(**ids, **({"average": "macro"} if macro else {}))
        results = {}
        for key, value in values.items():
            if np.ndim(value) == 0 and isinstance(value, (int, float, np.number, np.bool_, np.ndarray)):
                results[f"{Path(name).stem}_{key}" if key in taken else key] = float(value)
            elif f"{name}/{key}" not in self._dropped:
                self._dropped.add(f"{name}/{key}")
                logger.warning("metric %s: %s is not a number and is left out", name, key)
        return results

    def _try_extras(self) -> None:
        """Finds out now, not after the first epoch, that a metric wants more than class ids."""
        every_class = np.arange(len(self.classes))
        for name in self._extra:
            try:
                self._compute_extra(name, {"predictions": every_class, "references": every_class}, taken={})
            except Exception as error:
                raise UserError(
                    f"metric {name!r} cannot be computed from predicted and true class ids ({first_line(error)}); "
                    "leave it out, or wrap it in a metric of your own and give the path to its folder"
                ) from error


@functools.cache
def _writable_cache() -> tempfile.TemporaryDirectory | None:
    """`evaluate` imports a copy of a module from its cache; where that is read-only, from a temporary folder.

    So does a sealed process (`bundle`), with the metrics of its bundle in that folder and no others.
    """
    caches = (evaluate.config.HF_MODULES_CACHE, evaluate.config.HF_METRICS_CACHE)
    sealed = bundle.opened()
    if sealed is None and all(map(_can_be_written, caches)):
        return None
    temporary = tempfile.TemporaryDirectory(prefix="vit_dist_metrics_")
    evaluate.config.HF_MODULES_CACHE = evaluate.config.HF_METRICS_CACHE = Path(temporary.name)
    if sealed is None:
        return temporary
    evaluate.logging.set_verbosity_error()  # that a metric is from the cache is as it should be
    for path in (sealed / bundle.MODULES).rglob("*"):
        copy = Path(temporary.name, Path(bundle.MODULES).name, path.relative_to(sealed / bundle.MODULES))
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return temporary  # kept alive by the cache of this function, removed at exit


def _can_be_written(folder: str | Path) -> bool:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _load_shipped(name: str) -> evaluate.EvaluationModule:
    try:
        return evaluate.load(str(MODULES / name), keep_in_memory=True)
    except Exception as error:  # e.g. a copy cut short by a kill; `evaluate` would never renew it
        raise UserError(
            f"metric {name!r} of vit_dist cannot be loaded from the copy that `evaluate` keeps ({first_line(error)}); "
            f"delete {Path(evaluate.config.HF_MODULES_CACHE, 'evaluate_modules')} and try again"
        ) from error


def _load_extra(name: str) -> evaluate.EvaluationModule:
    """A user's metric: from a local path, else from the hub, else what an earlier run left in the cache."""
    try:
        if name.endswith(".py") or Path(name, f"{Path(name).name}.py").is_file():
            return evaluate.load(name, keep_in_memory=True)
        # `evaluate` has an offline switch of its own and does not look at the hub's.
        online = os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE")
        if online and (metric := _load_from_hub(name)):
            return metric
        with _offline():
            return evaluate.load(name, keep_in_memory=True)
    except Exception as error:
        raise UserError(
            f"metric {name!r} cannot be loaded ({first_line(error)}); give the path of a folder <name>/ that holds "
            "<name>.py, or run once where the Hugging Face hub can be reached"
        ) from error


def _load_from_hub(name: str) -> evaluate.EvaluationModule | None:
    """None if the hub does not have it, or does not answer in time."""
    found: list[evaluate.EvaluationModule] = []

    def load() -> None:
        with contextlib.suppress(Exception):  # the look into the cache that follows says what is wrong
            found.append(evaluate.load(name, keep_in_memory=True))

    thread = threading.Thread(target=load, daemon=True)  # a daemon: the process may end before it does
    thread.start()
    thread.join(HUB_TIMEOUT)
    return found[0] if found else None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    before, evaluate.config.HF_EVALUATE_OFFLINE = evaluate.config.HF_EVALUATE_OFFLINE, True
    try:
        yield
    finally:
        evaluate.config.HF_EVALUATE_OFFLINE = before
