"""The model: a pretrained image classifier with a head for the data's classes. It knows no devices or processes."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # no public name yet; torch.export is built on it
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, ViTConfig

from vit_dist.errors import UserError
from vit_dist.options import ModelOptions


@dataclass(frozen=True)
class BuiltModel:
    model: PreTrainedModel
    description: str  # one line: what it is, its size, which weights are new
    revision: str | None  # commit of a hub model


def build_model(
    options: ModelOptions, classes: list[str], input_size: int, *, seed: int, cache_dir: str | None = None
) -> BuiltModel:
    """Load the checkpoint (or make `tiny`), with a head for `classes`, for square inputs of `input_size` pixels.

    New weights are drawn from `seed`, so that they are the same in every process. Weights are float32: mixed
    precision is the Trainer's business. Raises UserError if there is no such model or it cannot take the input.
    """
    torch.manual_seed(seed)
    if options.model == "tiny":
        model, notes, revision = _tiny(input_size), ["random weights"], None
        _name_classes(model.config, classes)
        model = type(model)(model.config)
    else:
        model, notes, revision = _pretrained(options, classes, cache_dir)
        if options.image_size is not None and getattr(model.config, "image_size", None) not in (None, input_size):
            before = model.config.image_size
            model, changed = _interpolated(model, input_size)
            notes += [f"interpolated from {before} to {input_size} px: {_listed(changed)}"] if changed else []
    unused = _check_forward(model, options.model, input_size, len(classes))
    notes += [f"not trained, the logits do not depend on them: {_listed(unused)}"] if unused else []
    size = sum(parameter.numel() for parameter in model.parameters())
    name = options.model + (f"@{revision[:12]}" if revision else "")
    return BuiltModel(model, f"{name}, {size / 1e6:.1f} M parameters, {input_size} px; {'; '.join(notes)}", revision)


def skeleton(
    options: ModelOptions, classes: list[str], input_size: int, *, cache_dir: str | None = None
) -> PreTrainedModel:
    """The model that `build_model` would make, on the meta device: shapes, and what is trained, without weights."""
    if options.model == "tiny":
        config = _tiny(input_size).config
    else:
        config = _config(options, cache_dir)
        if options.image_size is not None and getattr(config, "image_size", None) is not None:
            config.image_size = input_size
    _name_classes(config, classes)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    twin = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unused = _check_forward(twin.to_empty(device="cpu"), options.model, input_size, len(classes))
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    return model


def reload_strictly(model: torch.nn.Module, folder: str | Path) -> None:
    """Load a saved model's weights into `model`, every tensor or none.

    Saved files carry the hub's names, which `from_pretrained` translates; `load_state_dict` on the raw file, as
    `Trainer` does it, would drop most of a ViT's encoder (transformers 5.23, trainer.py `_load_from_checkpoint`).
    Raises RuntimeError on any missing, unexpected or misshapen tensor.
    """
    model.load_state_dict(saved_weights(model, folder), strict=True)


def saved_weights(model: torch.nn.Module, folder: str | Path) -> dict[str, torch.Tensor]:
    """A saved model's weights under the names of the modules of `model`, which may be sharded. Raises as above."""
    family = next(
        c for c in type(model).__mro__ if c.__module__.startswith("transformers.")
    )  # FSDP2 puts a class before it
    saved, info = family.from_pretrained(  # type: ignore[attr-defined]
        folder, output_loading_info=True, dtype="auto"
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise RuntimeError(f"{folder} does not hold this model's weights: {wrong}")
    return saved.state_dict()


def _tiny(input_size: int) -> PreTrainedModel:
    from transformers import ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        image_size=input_size, patch_size=max(1, input_size // 4),
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _name_classes(config: Any, classes: list[str]) -> None:
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"


def _pretrained(
    options: ModelOptions, classes: list[str], cache_dir: str | None
) -> tuple[PreTrainedModel, list[str], str | None]:
    where = _where(options, cache_dir)
    config = _config(options, cache_dir)
    try:
        same_head = [config.id2label.get(i) for i in range(config.num_labels)] == classes
        _name_classes(config, classes)
        revision = getattr(config, "_commit_hash", None)
        if options.from_scratch:
            return (
                AutoModelForImageClassification.from_config(config, dtype=torch.float32),
                ["random weights"],
                revision,
            )
        model, info = AutoModelForImageClassification.from_pretrained(
            options.model,
            config=config,
            use_safetensors=True,  # pickled weights can run code
            ignore_mismatched_sizes=True,  # the old head
            output_loading_info=True,
            dtype=torch.float32,
            **where,
        )
    except (OSError, ValueError) as error:
        raise UserError(_not_loaded(options, error)) from None
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    new = set(info["missing_keys"]) | {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    if not same_head:
        new |= _renew(model, head)
    backbone = [name for name, _ in model.named_parameters() if name.split(".")[0] not in head]
    lost = [name for name in backbone if name in new]
    if len(lost) > len(backbone) / 2:
        raise UserError(
            f"model {options.model}: {len(lost)} of {len(backbone)} backbone weights are not in the checkpoint, for "
            f"example {lost[0]}; it is not a {config.model_type} checkpoint that transformers can load"
        )
    notes = [
        f"new weights: {_listed(new)}" if new else f"no new weights (the head already has these {len(classes)} classes)"
    ]
    if info["unexpected_keys"]:
        notes.append(f"not used: {_listed(info['unexpected_keys'])}")
    return model, notes, revision


def _where(options: ModelOptions, cache_dir: str | None) -> dict[str, Any]:
    return {"revision": options.model_revision or "main", "cache_dir": cache_dir, "trust_remote_code": False}


def _config(options: ModelOptions, cache_dir: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(options.model, **_where(options, cache_dir))
    except (OSError, ValueError) as error:
        raise UserError(_not_loaded(options, error)) from None


def _renew(model: PreTrainedModel, head: list[str]) -> set[str]:
    """Draw the head anew, also where the old one happens to have as many classes. Returns the parameters' names."""
    names = set()
    for child in head:
        for path, module in model.get_submodule(child).named_modules(prefix=child):
            own = [name for name, _ in module.named_parameters(recurse=False)]
            for name in own:
                getattr(module, name)._is_hf_initialized = False  # else upstream's initialisers leave it as it is
            if own:
                model._init_weights(module)
            names |= {f"{path}.{name}" for name in own}
    return names


def _listed(keys: Any, most: int = 6) -> str:
    keys = sorted(map(str, keys))
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _not_loaded(options: ModelOptions, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    if "safetensors" in str(error):
        return f"model {options.model}: no safetensors weights there; pickled weights are not loaded ({first})"
    return (
        f"model {options.model}: could not be loaded as an image classifier: {first} "
        "(give a hub id, a folder with config.json and model.safetensors, or `tiny`)"
    )


def _interpolated(model: PreTrainedModel, input_size: int) -> tuple[PreTrainedModel, list[str]]:
    """The same model for another input size: positions interpolated (bicubic) and named, the rest as it was."""
    config = copy.deepcopy(model.config)
    config.image_size = input_size
    try:
        resized = type(model)(config)
    except Exception as error:
        raise UserError(f"image_size={input_size} does not suit this model: {str(error).splitlines()[0]}") from error
    wanted = resized.state_dict()
    state = model.state_dict()
    changed = [name for name, value in state.items() if value.shape != wanted[name].shape]
    state.update({name: _interpolate(name, state[name], wanted[name]) for name in changed})
    resized.load_state_dict(state, strict=True)
    return resized, changed


def _interpolate(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Position embeddings (1, tokens, width) or relative position biases (offsets, heads) for another grid.

    Tokens that stand for no patch (class, distillation; class-to-token offsets) are kept. Dosovitskiy et al. 2021,
    https://arxiv.org/abs/2010.11929, section 3.2.
    """
    if re.search(r"position_embeddings?$", name) and value.dim() == 3:
        grid, extra = _split_grid(value[0])
        _, like_extra = _split_grid(like[0])
        side = round((like.shape[1] - like_extra) ** 0.5)
        return torch.cat([value[:, :extra], _resize_grid(value[0, extra:], grid, side)[None]], dim=1)
    if name.endswith("relative_position_bias_table"):
        extra = 3 if round((len(value) - 3) ** 0.5) ** 2 == len(value) - 3 else 0  # BEiT: cls-token, token-cls, cls-cls
        grid, side = round((len(value) - extra) ** 0.5), round((len(like) - extra) ** 0.5)
        return torch.cat([_resize_grid(value[: len(value) - extra], grid, side), value[len(value) - extra :]])
    raise UserError(f"--image_size: do not know how to interpolate {name} {tuple(value.shape)} to {tuple(like.shape)}")


def _split_grid(tokens: torch.Tensor) -> tuple[int, int]:
    """(side of the square patch grid, number of tokens before it) of an embedding table (tokens, width)."""
    side = int(len(tokens) ** 0.5)
    return side, len(tokens) - side * side


def _resize_grid(table: torch.Tensor, old: int, new: int) -> torch.Tensor:
    grid = table.T.reshape(1, -1, old, old)
    return F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False).reshape(table.shape[1], -1).T


def _check_forward(model: PreTrainedModel, name: str, input_size: int, num_classes: int) -> list[str]:
    """One image through the model and back, so that a size it cannot take is an error now and not at the first step.

    Parameters that get no gradient (a mask token, an unused pooler) are frozen and named: DistributedDataParallel
    would wait for their gradients for ever, or has to search for them at every step.
    """
    try:
        logits = model.eval()(torch.zeros(1, 3, input_size, input_size)).logits
    except Exception as error:
        raise UserError(
            f"model {name} does not take {input_size} x {input_size} images: {str(error).splitlines()[0]}; "
            "set --image_size"
        ) from error
    if logits.shape != (1, num_classes):
        raise UserError(f"model {name} yields logits {tuple(logits.shape)}, not (1, {num_classes})")
    logits.sum().backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    for key in unused:
        model.get_parameter(key).requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return unused
