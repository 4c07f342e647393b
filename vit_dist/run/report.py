"""What a finished run leaves for people and programs. Plain functions of finished values, called on rank 0."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import ImageColor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vit_dist.config import Config
from vit_dist.data.dataset import ImageDataset
from vit_dist.families import OURS
from vit_dist.files import replacing
from vit_dist.terminal import markdown, markdown_code, one_line

CHECKED_IMAGES = 8
MOST_CONFUSIONS = 3


def confusions(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The most frequent ones, such as "cat taken for dog: 12 of 80"; ties in class order."""
    wrong = labels != predicted
    pairs, counts = np.unique(labels[wrong].astype(np.int64) * len(classes) + predicted[wrong], return_counts=True)
    of_class = np.bincount(labels, minlength=len(classes))
    most = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    return [
        f"{classes[pair // len(classes)]} taken for {classes[pair % len(classes)]}: {count} of "
        f"{of_class[pair // len(classes)]}"
        for pair, count in zip(pairs[most].tolist(), counts[most].tolist(), strict=True)
    ]


def closing_lines(folder: Path, split: str, confused: Sequence[str], warnings: Sequence[str]) -> list[str]:
    """What a person wants to know of a finished run beside its accuracy."""
    lines = [f"WARNING: {warning}" for warning in warnings]
    lines += [f"most frequent confusions in {split}: {'; '.join(confused) or 'none'}"]
    return [*lines, f"model: {folder / 'best'}", f"predictions of {split}: {folder / 'predictions.parquet'}"]


def write_predictions(path: Path, dataset: ImageDataset, split: str, classes: list[str], logits: np.ndarray) -> None:
    """One row per image: `split`, `id`, `path` (of the file; null for an image in a table), `label`, `predicted`,
    `correct`, `probabilities` (float32, in class order).
    """
    labels = np.asarray(dataset.table["label"])
    shifted = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
    probabilities = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
    predicted = logits.argmax(axis=1)
    names = np.asarray(classes, dtype=object)
    table = pa.table(
        {
            "split": pa.array([split] * len(labels)),
            "id": pa.array(list(dataset.ids), pa.string()),
            "path": dataset.paths,
            "label": pa.array(names[labels].tolist(), pa.string()),
            "predicted": pa.array(names[predicted].tolist(), pa.string()),
            "correct": pa.array(predicted == labels),
            "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(probabilities.ravel()), len(classes)),
        }
    )
    with replacing(path) as partial:
        pq.write_table(table, partial)


def check_export(
    folder: Path,
    dataset: ImageDataset,
    seen: torch.Tensor,
    logits: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    levels: float = 0.0,
) -> None:
    """Reload an exported model as a user would and compare it with what the run computed.

    `seen` (n, 3, side, side) and `logits` (n, classes) are the run's own for the first images of `dataset`. The
    reloaded image processor must make the same pixels, to the bit or to so many grey levels; logits of what was seen
    may differ by what the batch size does to rounding. Raises RuntimeError.
    """
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    count = len(seen)
    images = [dataset.decoded(i) for i in range(count)]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    level = torch.tensor(processor.rescale_factor / np.array(processor.image_std) if levels else 0.0).reshape(-1, 1, 1)
    if pixels.shape != seen.shape or not ((pixels - seen).abs() <= levels * level).all():
        raise RuntimeError(
            f"{folder}: the saved image processor does not make the pixels that the model was evaluated on"
        )
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        again = model(pixel_values=seen.to(device)).logits.float().cpu().numpy()
    ours = logits[:count].astype(np.float32)
    tolerance = (1e-4 if dtype == torch.float32 else 5e-2) * max(1.0, float(np.abs(ours).max()))
    if not np.abs(again - ours).max() <= tolerance:
        raise RuntimeError(
            f"{folder}: the saved model's logits differ from the run's by {np.abs(again - ours).max():.3g}; "
            "the weights were not saved as they were trained"
        )


def finish_export(folder: Path) -> None:
    """Give the weights the permissions that other files get (safetensors writes 0600), and drop pickled arguments."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def write_model_card(
    folder: Path,
    config: Config,
    description: Sequence[str],
    classes: Sequence[str],
    results: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """README.md of the exported model: data, recipe, results, and how to use it."""
    base, name = config.model.model, one_line(config.output_dir.name)
    on_hub = base != "tiny" and not Path(base).exists()
    splits = [split for split in ("test", "eval") if f"{split}_accuracy" in results]
    shown = [name for name in CARD_METRICS if f"{splits[0]}_{name}" in results] if splits else []
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vit_dist"],
        base_model=base if on_hub else None,
        model_name=name,
        eval_results=[_eval_result(split, config.data.data, results) for split in splits],
    )
    settings = {
        **{key: config.resolved()[key] for key in CARD_SETTINGS},
        "global_batch_size": results["global_batch_size"],
    }
    content = CARD.format(
        metadata=metadata.to_yaml(),
        name=markdown(name),
        base=markdown_code(base if on_hub or base == "tiny" else Path(base).name),
        imports=_imports(folder),
        background=config.data.image_background,
        rgb=ImageColor.getrgb(config.data.image_background)[:3],
        data="\n".join(f"- {markdown(line)}" for line in description),
        classes=", ".join(map(markdown_code, classes[:50])) + (" and more" if len(classes) > 50 else ""),
        which=f"The best of {results['train_steps']:,} steps by the validation split, step {results['best_step']:,}."
        if "best_step" in results
        else f"The model after step {results['train_steps']:,}, the last.",
        header=" | ".join(shown),
        rule="|---" * (2 + len(shown)) + "|",
        numbers="\n".join(_card_row(split, results, shown) for split in splits),
        settings="\n".join(f"| `{key}` | {markdown(str(value))} |" for key, value in settings.items()),
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
    )
    ModelCard(content, ignore_metadata_errors=True).save(folder / "README.md")


def _imports(folder: Path) -> str:
    """The line that a model needs whose classifier is not transformers' own."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return "import vit_dist.classifiers  # registers this model's class\n" if model_type in OURS else ""


def _eval_result(split: str, data: str, results: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type="imagefolder" if Path(data).expanduser().exists() else one_line(data),
        dataset_name=one_line(Path(data).name),
        dataset_split="validation" if split == "eval" else split,
        metric_type="accuracy",
        metric_value=results[f"{split}_accuracy"],
    )


def _card_row(split: str, results: Mapping[str, Any], shown: Sequence[str]) -> str:
    numbers = " | ".join(f"{results[f'{split}_{name}']:.4f}" for name in shown)
    return f"| {'validation' if split == 'eval' else split} | {results[f'{split}_samples']:,} | {numbers} |"


CARD_METRICS = ("accuracy", "top5_accuracy", "f1_macro", "balanced_accuracy", "loss")
CARD_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "num_train_epochs", "max_steps",
    "label_smoothing_factor", "random_resized_crop", "horizontal_flip", "seed", "bf16", "fp16",
)  # fmt: skip

CARD = """---
{metadata}
---

# {name}

An image classifier, fine-tuned from {base} with vit_dist.

## Use

```python
{imports}from transformers import pipeline

classify = pipeline("image-classification", model="path/to/this/folder")
classify("photo.jpg")
```

In training, transparent pixels were shown on {background} and 16-bit gray was scaled to 8 bits. The pipeline treats
such files otherwise; for the same pixels:

```python
from vit_dist.data.decode import DecodeRules, decode

classify(decode("photo.png", DecodeRules(background={rgb})))
```

## Results

{which} The test split, where there is one, was evaluated once, at the end.

| split | images | {header} |
{rule}
{numbers}

## Data

{data}

Classes: {classes}

## Training

| setting | value |
|---|---|
{settings}

Versions: {versions}
"""
