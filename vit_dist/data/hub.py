"""Data sets on the Hugging Face hub, pinned to a commit, and their local copies when there is no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import datasets

from vit_dist import bundle
from vit_dist.errors import UserError, first_line

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

_TIMEOUT = 10.0  # seconds


def load_hub(data: str, options: DataOptions) -> tuple[dict[str, datasets.Dataset], str | None]:
    """A data set on the Hugging Face hub, or one that was downloaded before if the hub cannot be reached.

    Its splits by name, and its commit if known. A sealed process (`bundle`) has it from its bundle. Raises
    `UserError` within seconds if it cannot be had.
    """
    if (folder := bundle.opened()) is not None:
        return _bundled(folder, data)
    commit, unreachable = hub_commit(data, options.data_revision)
    try:
        with offline(unreachable):
            builder = datasets.load_dataset_builder(
                data,
                name=options.data_config,
                revision=commit or options.data_revision,
                cache_dir=datasets_cache(options.cache_dir),
            )
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except Exception as error:  # the hub's, the network's and every file format's
        if unreachable:
            raise UserError(
                f"--data {data}: no such path exists here, the Hugging Face hub cannot be reached, and no copy is "
                "in the cache"
            ) from error
        why = first_line(error.__cause__ or error)
        raise UserError(f"--data {data}: the Hugging Face hub has it, but: {why}") from error
    commit = commit or (builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None)
    return dict(splits), commit


def _bundled(folder: Path, data: str) -> tuple[dict[str, datasets.Dataset], str]:
    facts = bundle.read(folder)["data"]
    if facts is None or facts["name"] != data:
        raise UserError(f"--data {data}: no such path exists here, and the bundle {folder} does not hold it")
    try:
        return dict(datasets.load_from_disk(str(folder / bundle.DATA))), facts["commit"]
    except Exception as error:  # whatever a damaged file leads to
        why = first_line(error.__cause__ or error)
        raise UserError(f"cannot read {folder / bundle.DATA}: {why}") from error


def hub_commit(data: str, revision: str | None) -> tuple[str | None, bool]:
    """The commit that `revision` names now, and whether the hub is out of reach (so that nobody can tell).

    One request without retries: loading would try for half a minute before it says that there is no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return HfApi().dataset_info(data, revision=revision, timeout=_TIMEOUT).sha, False
    except HFValidationError as error:
        why = first_line(error.__cause__ or error)
        raise UserError(f"--data {data}: no such path exists here, and it is not a hub id: {why}") from error
    except GatedRepoError as error:
        raise UserError(
            f"--data {data}: ask for access at https://huggingface.co/datasets/{data}, then log in"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"--data {data}: no such path exists here, and no such data set on the Hugging Face hub; log in if it is "
            "private"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"--data_revision {revision}: {data} has no such revision") from error
    except Exception:  # no network, no name server, a proxy's error page, offline mode
        return None, True


@contextmanager
def offline(active: bool) -> Iterator[None]:
    """Keep the libraries from asking the hub again: they look into their caches at once."""
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if active:
            hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def datasets_cache(cache_dir: str | None) -> str | None:
    """Where `datasets` keeps what it downloads and converts, None for its default."""
    return None if cache_dir is None else str(Path(cache_dir).expanduser() / "datasets")
