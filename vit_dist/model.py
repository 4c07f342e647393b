"""The model: a pretrained image classifier with a head for the data's classes. It knows no devices or processes."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # no public name yet; torch.export is built on it
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig

from vit_dist.errors import UserError, first_line
from vit_dist.families import Family, image_side, load_family, location, not_loaded, set_image_size
from vit_dist.listing import listed
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
    precision is the Trainer's business. Raises UserError if there is no such model, if anything but its classifier
    would be new, or if it cannot take the input.
    """
    torch.manual_seed(seed)
    if options.model == "tiny":
        model, notes, revision = _tiny(input_size, classes), ["random weights"], None
    else:
        model, notes, revision = _pretrained(options, classes, cache_dir)
        before = image_side(model.config)
        if options.image_size is not None and before not in (None, input_size):
            model, changed = _interpolated(model, input_size)
            notes += [f"interpolated from {before} to {input_size} px: {listed(sorted(changed))}"] if changed else []
    unused = _check_forward(model, options.model, input_size, len(classes))
    notes += [f"not trained, the logits do not depend on them: {listed(sorted(unused))}"] if unused else []
    size = sum(parameter.numel() for parameter in model.parameters())
    name = options.model + (f"@{revision[:12]}" if revision else "")
    return BuiltModel(model, f"{name}, {size / 1e6:.1f} M parameters, {input_size} px; {'; '.join(notes)}", revision)


def meta_model(
    options: ModelOptions, classes: list[str], input_size: int, *, cache_dir: str | None = None
) -> PreTrainedModel:
    """The model that `build_model` would make, on the meta device: shapes, and what is trained, without weights."""
    if options.model == "tiny":
        config = _tiny(input_size, classes).config
    else:
        config = load_family(options, cache_dir).config
        if options.image_size is not None:
            set_image_size(config, input_size)
    _name_classes(config, classes)
    with torch.device("meta"):
        model = _from_config(options, config)
    model_copy = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unused = _check_forward(model_copy.to_empty(device="cpu"), options.model, input_size, len(classes))
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    return model


def random_draws(model: torch.nn.Module) -> str:
    """What the model draws at random in training, such as `dropout 0.1`; empty if nothing.

    Each process draws for its own images, so that the losses of one process and of several differ.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        rates = {"dropout": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else vars(module)
        for name, rate in rates.items():
            # Attention and drop path keep their rate in an attribute; PP-LCNet's is a constant factor.
            if "drop" in name and isinstance(rate, float) and rate > 0 and name != "hidden_dropout_prob":
                kind = "drop path" if "path" in type(module).__name__.lower() or name == "drop_prob" else "dropout"
                found[kind] = max(found.get(kind, 0.0), rate)
    return " and ".join(f"{kind} {rate:g}" for kind, rate in sorted(found.items(), reverse=True))


def differing_draws(draws: str) -> str:
    """The warning for several processes; `draws` as `random_draws` returns them."""
    return f"{draws}: each process draws its own, so losses differ between numbers of processes (equal in the mean)"


def reload_strictly(model: torch.nn.Module, folder: str | Path) -> None:
    """Load a saved model's weights into `model`, every tensor or none.

    Saved files carry the hub's names, which `from_pretrained` translates; `load_state_dict` on the raw file, as
    `Trainer` does it, would drop most of a ViT's encoder (transformers 5.23, trainer.py `_load_from_checkpoint`).
    Raises RuntimeError on any missing, unexpected or misshapen tensor.
    """
    model.load_state_dict(saved_weights(model, folder), strict=True)


def saved_weights(model: torch.nn.Module, folder: str | Path) -> dict[str, torch.Tensor]:
    """A saved model's weights under the names of the modules of `model`, which may be sharded. Raises as above."""
    # FSDP2 derives a class of its own from the model's.
    family = next(c for c in type(model).__mro__ if c.__module__.startswith(("transformers.", "vit_dist.")))
    saved, info = family.from_pretrained(  # type: ignore[attr-defined]
        folder, output_loading_info=True, dtype="auto"
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise RuntimeError(f"{folder} does not hold this model's weights: {wrong}")
    return saved.state_dict()


def _tiny(input_size: int, classes: list[str]) -> PreTrainedModel:
    """Four patches to a side. Without dropout, so that any number of processes trains the same."""
    from transformers import ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        image_size=input_size, patch_size=max(1, input_size // 4),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    _name_classes(config, classes)
    return ViTForImageClassification(config)


def _name_classes(config: Any, classes: list[str]) -> None:
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"


def _pretrained(
    options: ModelOptions, classes: list[str], cache_dir: str | None
) -> tuple[PreTrainedModel, list[str], str | None]:
    """The checkpoint as an image classifier for `classes`, notes on it, and the commit of a hub model."""
    family = load_family(options, cache_dir)
    config, notes = family.config, [family.note] if family.note else []
    revision = getattr(config, "_commit_hash", None)
    same_classes = config.id2label == dict(enumerate(classes))
    _name_classes(config, classes)
    if options.from_scratch:
        return _from_config(options, config, dtype=torch.float32), [*notes, "random weights"], revision
    model, missing, mismatched, unused = _loaded(options, family, cache_dir)
    of_classes = sized_by_classes(model)
    _require_backbone(options.model, model, missing | mismatched, mismatched - of_classes, of_classes)
    new = missing | mismatched
    if not same_classes:
        _draw_anew(model, of_classes - new)
        new |= of_classes
    count = len(classes)
    notes.append(
        f"new weights: {listed(sorted(new))}" if new else f"no new weights (the head has these {count} classes)"
    )
    if unused:
        notes.append(f"not used: {listed(sorted(unused))}")
    return model, notes, revision


def _from_config(options: ModelOptions, config: Any, **kwargs: Any) -> PreTrainedModel:
    try:
        return AutoModelForImageClassification.from_config(config, **kwargs)
    except (ImportError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(not_loaded(options.model, error)) from None


def _loaded(
    options: ModelOptions, family: Family, cache_dir: str | None
) -> tuple[PreTrainedModel, set[str], set[str], set[str]]:
    """(model, missing, mismatched, unused): names of parameters that the checkpoint lacks, that it has in another
    shape, and of its tensors that the model has no place for.
    """
    loading: dict[str, Any] = {
        "use_safetensors": True,  # pickled weights can run code
        "ignore_mismatched_sizes": True,  # the old head; `_require_backbone` looks at the others
        "output_loading_info": True,
        "dtype": torch.float32,
        **location(options, cache_dir),
    }
    try:
        if family.is_tower:
            model = AutoModelForImageClassification.from_config(family.config, dtype=torch.float32)
            tower, info = type(model.vision_model).from_pretrained(options.model, **loading)
            model.vision_model.load_state_dict(tower.state_dict(), strict=True)
        else:
            model, info = AutoModelForImageClassification.from_pretrained(
                options.model, config=family.config, **loading
            )
    except (OSError, ValueError, ImportError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(not_loaded(options.model, error)) from None
    prefix = "vision_model." if family.is_tower else ""
    missing, mismatched = (
        {prefix + (key if isinstance(key, str) else key[0]) for key in info[kind]}
        for kind in ("missing_keys", "mismatched_keys")
    )
    if family.is_tower:
        missing |= {name for name in model.state_dict() if not name.startswith(prefix)}
    # Batch norm counts its batches and computes nothing with the number.
    missing = {name for name in missing if not name.endswith("num_batches_tracked")}
    return model, missing, mismatched, set(info["unexpected_keys"])


def sized_by_classes(model: PreTrainedModel) -> set[str]:
    """Names of the parameters whose shape depends on the number of classes."""
    config = copy.deepcopy(model.config)
    config.num_labels = (model.config.num_labels or 0) + 1
    with torch.device("meta"):
        other = type(model)(config).state_dict()
    return {name for name, value in model.state_dict().items() if value.shape != other[name].shape}


def _require_backbone(
    name: str, model: PreTrainedModel, new: set[str], misshapen: set[str], of_classes: set[str]
) -> None:
    """Raise UserError if any weight but the classifier's is `new`, or is `misshapen` in the checkpoint.

    The classifier is what holds the parameters that depend on the number of classes: the model's child that they are
    in (LeViT's has a batch norm besides), or their own layer where that child is the whole model (Perceiver).
    """
    state, model_type = model.state_dict(), model.config.model_type
    most = sum(value.numel() for value in state.values()) / 2
    heads = set()
    for key in of_classes:
        child = key.split(".")[0] + "."
        size = sum(value.numel() for other, value in state.items() if other.startswith(child))
        alone = size > most and any(
            other.startswith(child) and not other.startswith(key.rpartition(".")[0]) for other in state
        )
        heads.add(key.rpartition(".")[0] + "." if alone else child)
    lost = sorted(key for key in new if not key.startswith(tuple(heads)) and not _is_last_norm(model, key))
    lost = sorted({*lost, *misshapen})
    if lost:
        how = "of another shape" if lost[0] in misshapen else "not"
        raise UserError(
            f"model {name}: {len(lost)} of {len(state)} weights besides the classifier are {how} in the checkpoint and "
            f"would be random: {listed(lost, most=3)}; it is not a {model_type} checkpoint that transformers can load. "
            "Give another checkpoint, or train without pretrained weights: --from_scratch"
        )


def _is_last_norm(model: PreTrainedModel, name: str) -> bool:
    """Whether it is of a normalisation between the backbone and the classifier, which many base checkpoints lack and
    which starts as the identity: a pooler's (BEiT, Data2Vec), or a child of the classifier itself (PoolFormer).
    """
    path = name.rpartition(".")[0]
    between = "." not in path or ".pooler." in f".{path}."
    return between and "norm" in type(model.get_submodule(path)).__name__.lower()


def _draw_anew(model: PreTrainedModel, names: set[str]) -> None:
    """Initialise these parameters again: the checkpoint's are for as many other classes."""
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(path)
        for own, parameter in module.named_parameters(recurse=False):
            # Upstream's initialisers leave alone what bears this mark.
            parameter._is_hf_initialized = f"{path}.{own}" not in names  # type: ignore[attr-defined]
        model._init_weights(module)


def _interpolated(model: PreTrainedModel, input_size: int) -> tuple[PreTrainedModel, list[str]]:
    """The same model for another input size: positions interpolated (bicubic) and named, the rest as it was."""
    config = copy.deepcopy(model.config)
    set_image_size(config, input_size)
    try:
        resized = type(model)(config)
    except Exception as error:
        raise UserError(f"image_size={input_size} does not suit this model: {first_line(error)}") from error
    wanted = resized.state_dict()
    state = model.state_dict()
    changed = [name for name, value in state.items() if value.shape != wanted[name].shape]
    state.update({name: _interpolate(name, state[name], wanted[name]) for name in changed})
    resized.load_state_dict(state, strict=True)
    return resized, changed


def _interpolate(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Position embeddings (tokens, width) or relative position biases (offsets, heads) for another grid.

    Tokens that stand for no patch (class, distillation; class-to-token offsets) are kept. Dosovitskiy et al. 2021,
    https://arxiv.org/abs/2010.11929, section 3.2.
    """
    if re.search(r"position_embeddings?(\.weight)?$", name) and value.dim() in (2, 3):
        tokens = value.reshape(value.shape[-2:])
        grid, extra = _split_grid(tokens)
        side, _ = _split_grid(like.reshape(like.shape[-2:]))
        return torch.cat([tokens[:extra], _resize_grid(tokens[extra:], grid, side)]).view(like.shape)
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
        logits = model.eval()(pixel_values=torch.zeros(1, 3, input_size, input_size)).logits
    except Exception as error:
        raise UserError(
            f"model {name} does not take {input_size} x {input_size} images: {first_line(error)}; set --image_size"
        ) from error
    if logits.shape != (1, num_classes):
        raise UserError(f"model {name} yields logits {tuple(logits.shape)}, not (1, {num_classes})")
    logits.sum().backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    for key in unused:
        model.get_parameter(key).requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return unused
