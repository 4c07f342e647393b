"""The options of a run: ours, what we set for upstream's, and what is refused. Data only; `config` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"  # a value of per_device_train_batch_size: as many as fit


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataOptions:
    """Which images, and how they are split."""

    _argument_group_name = "data"

    data: str = _option(
        "digits",
        "What to train on: a Hugging Face hub data set id; a folder of class folders, with or without train/, "
        "validation/ and test/; a Parquet, CSV or JSONL file, a .txt list of paths and labels, or a folder of them "
        "(docs/tables.md); WebDataset .tar shards; a folder written by `save_to_disk`; or "
        "`digits`, 1,797 handwritten digits that come with scikit-learn.",
    )
    data_config: str | None = _option(None, "Configuration (subset) of a hub data set.")
    data_revision: str | None = _option(None, "Branch, tag or commit of a hub data set; the commit is recorded.")
    image_column_name: str | None = _option(None, "Column with the images. Default: found by type and name.")
    label_column_name: str | None = _option(None, "Column with the labels. Default: found by type and name.")
    image_root: str | None = _option(
        None, "Folder that the paths of images in a table are relative to. Default: the table's folder."
    )
    split_column_name: str | None = _option(
        None,
        "Column of a table that says which rows are for train, validation and test; `none` uses all rows alike. "
        "Default: found by its name and values (`split`, `subset`, `is_test`, ...).",
    )
    train_split: str | None = _option(None, "Name of the split to train on. Default: train.")
    validation_split: str | None = _option(
        None,
        "Name of the split to choose the best model by. Default: validation, valid, val, dev or eval if there is one, "
        "else held out of train.",
    )
    test_split: str | None = _option(
        None,
        "Name of the split that is evaluated once, at the end; `none` leaves a test split alone. Default: test if "
        "there is one.",
    )
    class_folders: str | None = _option(
        None,
        "Which folders are the classes of an image folder whose class folders hold folders: `top`, those directly in "
        "the split; `leaf`, those that hold the images, by name (merged if every name lies in several top folders, "
        "else by path where two have one name). Given, it also says that folders which may be splits, variants or "
        "beside a table are classes. Default: top, or a refusal where both make sense.",
        choices=["top", "leaf"],
    )
    train_val_split: float = _option(
        0.15, "Share of train to hold out, by class and by `data_seed`, when there is no validation split."
    )
    max_train_samples: int | None = _option(None, "Train on this many images at most (a seeded choice, by class).")
    max_eval_samples: int | None = _option(None, "Validate on this many images at most (a seeded choice, by class).")
    max_predict_samples: int | None = _option(None, "Test on this many images at most (a seeded choice, by class).")
    on_bad_image: str = _option(
        "error",
        "What to do about images that do not decode: `error` lists them and stops before training; `skip` leaves them "
        "out before sampling and counts them in the results.",
        choices=["error", "skip"],
    )
    max_bad_fraction: float = _option(0.01, "With `--on_bad_image skip`: stop if more than this share is bad.")
    verify_images: bool = _option(
        True,
        "Decode every image once before training and remember the outcome. Off: a bad image stops the run later.",
    )
    max_image_pixels: int = _option(
        120_000_000, "Refuse images with more pixels than this, before decoding them (decompression bombs)."
    )
    min_image_side: int = _option(2, "Refuse images with a side of fewer pixels than this.")
    image_background: str = _option("white", "Colour behind transparent pixels: a name or #rrggbb.")
    random_resized_crop: bool = _option(True, "Train on random crops, resized to the model's input.")
    crop_min_scale: float = _option(0.08, "Smallest share of the image's area that a random crop keeps.")
    horizontal_flip: bool = _option(True, "Mirror half of the training images. Off where left and right matter.")
    image_source: str = _option(
        "auto",
        "Where the pixels of a batch are made. `resident`: images of one size are decoded once and lie as bytes in the "
        "device's memory; crops, mirroring and normalisation are made there. `cache`: images are decoded and shrunk "
        "once, into a file from which data loading processes crop; the device normalises. `stream`: they decode and "
        "crop the images themselves. `processor`: all on the CPU, by the model's image processor. `auto`: on GPUs "
        "resident, else stream, on CPUs the processor.",
        choices=["auto", "resident", "cache", "stream", "processor"],
    )
    cache_dir: str | None = _option(
        None,
        "Where data sets, models and image indexes are cached. Default: the Hugging Face cache (HF_HOME).",
    )


@dataclass
class ModelOptions:
    """Which model."""

    _argument_group_name = "model"

    model: str = _option(
        "google/vit-base-patch16-224-in21k",
        "A hub id or a folder of any image classification model that transformers knows, of DINOv3, of ViT-MAE, of "
        "CLIP or SigLIP (the vision tower is trained), or `tiny`: a small ViT with random weights, for trying things "
        "out.",
    )
    model_revision: str | None = _option(None, "Branch, tag or commit of a hub model; the commit is recorded.")
    from_scratch: bool = _option(False, "Take only the architecture from --model, with random weights.")
    image_size: int | None = _option(
        None,
        "Input side in pixels, a multiple of the model's patch size. Default: the model's own. Another size "
        "interpolates the position embeddings once; the saved model has the new size.",
    )
    bf16_residual: bool = _option(
        False,
        "With --bf16: keep what runs from block to block in bfloat16 as well. Faster on GPUs; weights stay float32.",
    )


@dataclass
class ScalingOptions:
    """How a step is shared by the processes."""

    _argument_group_name = "batch and processes"

    global_batch_size: int | None = _option(
        None,
        "Images in an optimizer step, whatever the number of processes: gradient accumulation follows from it. "
        "Default: per_device_train_batch_size x processes x gradient_accumulation_steps.",
    )
    learning_rate_reference_batch: int | None = _option(
        None, "The global batch that --learning_rate is meant for; see --learning_rate_scaling."
    )
    learning_rate_scaling: str = field(
        default="none",
        metadata={
            "help": "Rescale the learning rate from the reference batch to the actual global batch.",
            "choices": ["none", "linear", "sqrt"],
        },
    )
    ddp_bf16_all_reduce: bool = _option(
        False, "With DDP: average gradients in bfloat16, half the traffic. For slow links between nodes."
    )


@dataclass
class RunOptions:
    """How the run behaves and what it reports."""

    _argument_group_name = "run"

    fresh: bool = _option(
        False, "Start over: an earlier run in the output folder is moved aside to <output_dir>.previous."
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "Further `evaluate` metrics, by name or path, beside the ones that are always computed."},
    )
    early_stopping_patience: int | None = _option(
        None, "Stop after this many evaluations in a row without a better `metric_for_best_model`."
    )
    early_stopping_threshold: float = _option(0.0, "How much better it must get to count for early stopping.")
    max_time: str | None = _option(
        None,
        "Stop by itself this long after the process was started (`3h50m`, `90s`), with a committed checkpoint and exit "
        "code 75; the same command goes on. Choose it shorter than the job's limit by the time of a step and a save.",
    )
    hang_timeout: str = _option(
        "30m",
        "End the job if no process gets on with a step for this long, and leave every process's stack in the run "
        "folder; 0 never does. On CPUs nothing else would end it.",
    )
    measure_peak: bool | None = _option(
        None,
        "Measure once how many operations the device can do, so that the log has its share (`mfu`). Default: on GPUs, "
        "where it takes 0.1 s.",
    )
    profile: int | None = _option(
        None,
        "Write a Chrome trace of this many steps, from the sixth on, to <output_dir>/profile, one for each process.",
    )
    save_keep_every: int | None = _option(
        None, "Besides the checkpoints of `save_total_limit`, keep each one whose step is a multiple of this."
    )
    keep_checkpoints: bool = _option(
        False,
        "Keep the checkpoints of a complete run. Default: they are deleted, because best/ holds the model, unless "
        "save_total_limit or save_keep_every is given.",
    )
    allow_change: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Settings (or `data`, `global_batch_size`, `model_revision`) that may differ from those that the "
            "run began with; the change is recorded in run.json. `restarts`: try again after three attempts without "
            "progress."
        },
    )
    logging_dir: str | None = _option(
        None, "Where TensorBoard logs go, with `--report_to tensorboard`. Default: <output_dir>/logs."
    )


# What we prefer to upstream's default, and why.
TRAINING_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "save_total_limit": 2,  # the best and the last
    "logging_strategy": "steps",
    "logging_steps": 10,
    "remove_unused_columns": False,  # there are no columns: our data set yields what the model takes
    "logging_nan_inf_filter": False,  # a NaN is an error, not a number to average away
    "ddp_find_unused_parameters": False,  # one pass over the graph less per step; every parameter is used
    "log_level": "error",  # upstream's warnings about its own files on a resumption, on every rank
    "log_level_replica": "error",
    "torch_compile": None,  # None: on GPUs; see `blocks`
    "report_to": None,  # None: Weights & Biases if the user is logged in
    "dataloader_num_workers": None,  # None: from the cores this process may use
    "dataloader_persistent_workers": None,  # None: if there are any; not forked anew in each epoch, beside our threads
    "do_train": True,  # what happens here; see STAGES
    "do_eval": True,
    "do_predict": True,
}

SECRET_KEYS = (
    "hub_token",
    "token",
    "use_auth_token",
    "api_key",
    "wandb_api_key",
    "hf_token",
    "push_to_hub_token",
)

RENAMED = {
    "dataset": "data",
    "dataset_name": "data",
    "dataset_config_name": "data_config",
    "train_dir": "data",
    "data_dir": "data",
    "model_name_or_path": "model",
    "model_name": "model",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps (a value below 1 is a share of all steps)",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "fresh",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}

# Short names that flags and recipe keys may have.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "wd": "weight_decay",
    "workers": "dataloader_num_workers",
    "patience": "early_stopping_patience",
}

# Values of upstream fields that would break a promise of this package, and the reason.
REFUSED = {
    "auto_find_batch_size": (True, "each process would find its own; --per_device_train_batch_size auto finds one"),
    "enable_jit_checkpoint": (True, "it saves without agreement between processes and can hang them"),
    "ignore_data_skip": (True, "a resumed run would see other images than the uninterrupted one"),
    "save_only_model": (True, "a run could not be resumed; `best/` holds the model alone"),
    "trust_remote_code": (True, "code from a model repository is never run"),
    "prediction_loss_only": (True, "there would be no metrics to choose the best model by"),
    "bf16_full_eval": (True, "the saved weights would not be those that were evaluated; --bf16 evaluates in bf16 too"),
    "fp16_full_eval": (True, "the saved weights would not be those that were evaluated"),
    "batch_eval_metrics": (True, "metrics are computed over the whole split, so that they are exact"),
    "push_to_hub": (True, "upload the finished model: hf upload <name> <output_dir>/best"),
    "remove_unused_columns": (True, "the data set has no columns to remove"),
    "eval_on_start": (True, "the first evaluation is at the first `eval_strategy` point"),
    "logging_nan_inf_filter": (True, "a NaN loss stops the run instead of being averaged away"),
}

_UPLOADS = "nothing is uploaded; upload the finished model: hf upload <name> <output_dir>/best"
_OWN_EVALUATION = "evaluations keep labels and predictions on the device and gather them once"

# Upstream fields that change nothing in this package: any value but upstream's default is refused with the reason.
WITHOUT_EFFECT = {
    "hub_model_id": _UPLOADS,
    "hub_strategy": _UPLOADS,
    "hub_private_repo": _UPLOADS,
    "hub_always_push": _UPLOADS,
    "hub_revision": _UPLOADS,
    "neftune_noise_alpha": "NEFTune adds noise to token embeddings, which images do not have",
    "include_num_input_tokens_seen": "images have no tokens to count",
    "length_column_name": "images have no length to group by",
    "use_cache": "it is for models that generate text",
    "use_liger_kernel": "Liger has kernels for language models only",
    "average_tokens_across_devices": "the loss is the mean over all images of a step on any number of devices",
    "eval_accumulation_steps": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "include_for_metrics": "metrics get every image's label, prediction and loss; --metrics adds further ones",
    "label_names": "the labels come from --data; --label_column_name names their column",
    "save_on_each_node": "all nodes share one run folder",
    "restore_callback_states_from_checkpoint": "a resumed run always restores them",
    "dataloader_in_order": "the images of each step are fixed, in their order",
}

# Upstream's switches for the stages of a run: only True is what happens here.
STAGES = {
    "do_train": "vit_dist.train always trains",
    "do_eval": "leave evaluations out with --eval_strategy no",
    "do_predict": "leave the test split alone with --test_split none",
}

# Numbers that upstream or PyTorch would only stumble over later: key -> (least, most), both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "train_val_split": (1e-9, 1 - 1e-9),
    "crop_min_scale": (1e-9, 1),
    "max_bad_fraction": (0, 1),
    "per_device_train_batch_size": (1, 1e9),
    "per_device_eval_batch_size": (1, 1e9),
    "gradient_accumulation_steps": (1, 1e9),
    "global_batch_size": (1, 1e9),
    "learning_rate_reference_batch": (1, 1e9),
    "num_train_epochs": (1e-9, 1e9),
    "learning_rate": (0, 1e30),
    "weight_decay": (0, 1e9),
    "max_grad_norm": (0, 1e30),
    "label_smoothing_factor": (0, 1),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_epsilon": (0, 1),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, 4096),
    "save_total_limit": (1, 1e9),
    "profile": (1, 1000),
    "save_keep_every": (1, 1e9),
    "early_stopping_patience": (1, 1e9),
    "early_stopping_threshold": (0, 1e30),
}
