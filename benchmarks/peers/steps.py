"""Train steps and training loops that others would write, each with the settings that its authors recommend.

Steps are returned, loops are run with a callback; `benchmarks/gpu.py` times both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from vit_dist.cost.peak import settle

Step = Callable[[], None]


def plain_step(model: torch.nn.Module, call: Callable[..., torch.Tensor], images: torch.Tensor) -> Step:
    """Forward in bf16 autocast, cross-entropy, backward, fused AdamW: the same loop for every model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.randint(0, 10, (len(images),), device=images.device)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = call(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timm_step(device: torch.device, images: torch.Tensor, channels_last: bool, **sizes: Any) -> Step:
    """timm's `vit_base_patch16_224`, compiled as its train.py does with --torchcompile."""
    import timm

    model = timm.create_model("vit_base_patch16_224", num_classes=10, **sizes).to(device).train()
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    return plain_step(model, torch.compile(model), images)


def ours_step(model: Any, device: torch.device, images: torch.Tensor, narrow: bool) -> Step:
    """The model of `vit_dist`, as its trainer gets it."""
    from vit_dist.blocks import Compilation, optimize_model

    model = model.to(device).train()
    optimize_model(model, None, Compilation(True, ""), narrow, device)
    return plain_step(model, lambda x: model(pixel_values=x).logits, images)


def tutorial(model: Any, folder: Path, data: Path, out: Path, steps: int, clock: Any) -> None:
    """The tutorial: processor in the main process, float32, batch 16, `TrainingArguments` as it writes them."""
    import datasets
    from transformers import AutoImageProcessor, Trainer, TrainingArguments

    processor = AutoImageProcessor.from_pretrained(folder)
    split = datasets.load_dataset("parquet", data_files=str(next(data.glob("train-*"))), split="train")

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = processor([image.convert("RGB") for image in rows["img"]], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "labels": rows["label"]}

    args = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=16, max_steps=steps, learning_rate=2e-5, logging_steps=10,
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    train = split.with_transform(transform)
    Trainer(model, args, train_dataset=train, data_collator=_collate, callbacks=[clock]).train()


def hf_example(
    model: Any, folder: Path, data: Path, out: Path, steps: int, batch: int, workers: int, clock: Any
) -> None:
    """`examples/pytorch/image-classification` of transformers, with the fastest flags that it takes."""
    from transformers import Trainer, TrainingArguments

    gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=batch, max_steps=steps, learning_rate=2e-5, logging_steps=50,
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True, bf16=gpu,
        tf32=True if gpu else None, torch_compile=True, dataloader_num_workers=workers, dataloader_drop_last=True,
        dataloader_persistent_workers=workers > 0, dataloader_prefetch_factor=4 if workers else None,
        accelerator_config={"non_blocking": True}, use_cpu=not gpu,
    )  # fmt: skip
    train = _augmented(folder, data)
    Trainer(model, args, train_dataset=train, data_collator=_collate, callbacks=[clock]).train()


def plain(model: Any, folder: Path, data: Path, steps: int, warm_up: int, batch: int, workers: int) -> float:
    """A loop without a Trainer: torchvision, a DataLoader, `torch.compile`, bf16 and fused AdamW where there is a GPU.

    Returns images per second after the first steps.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    loader = torch.utils.data.DataLoader(
        _augmented(folder, data), batch, shuffle=True, collate_fn=_collate, num_workers=workers, pin_memory=gpu,
        drop_last=True, persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
    )  # fmt: skip
    model = torch.compile(model.to(device).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    begin, batches = 0.0, (inputs for _ in range(steps) for inputs in loader)
    for step, inputs in zip(range(steps), batches, strict=False):
        if step == warm_up:
            begin = settle()
        pixels, labels = (inputs[name].to(device, non_blocking=True) for name in ("pixel_values", "labels"))
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            logits = model(pixel_values=pixels).logits
        F.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (steps - warm_up) * batch / (settle() - begin)


def _augmented(folder: Path, data: Path) -> Any:
    """The transformers example's transforms, over CIFAR-10."""
    import datasets
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    augment = Compose([RandomResizedCrop(processor.size["height"]), RandomHorizontalFlip(), ToTensor(), normalize])
    split = datasets.load_dataset("parquet", data_files=str(next(data.glob("train-*"))), split="train")

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {"pixel_values": [augment(image.convert("RGB")) for image in rows["img"]], "labels": rows["label"]}

    return split.with_transform(transform)


def _collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }
