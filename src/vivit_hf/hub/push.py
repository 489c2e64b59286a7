"""Push a model to the Hub: weights, configuration, the code that loads them, and a model card, in one commit."""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..model_files import upload
from .endpoint import check_endpoint, write_endpoint
from .model_card import Report, is_repo_id, read_distillation, read_initialisation, write_model_card


# Larger files take longer to repeat when a transfer fails; transformers' own limit is 50 GB.
MAX_SHARD_SIZE = "5GB"


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    tags: Sequence[str] | str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    report: Report | None = None,
    results: Mapping[str, float] | None = None,
    protocol: str | None = None,
    distillation: str | None = None,
    endpoint: bool = False,
) -> CommitInfo:
    """
    Upload a model and its model card to a repository on the Hub, which is created if it does not exist.

    `model.push_to_hub(repo_id, ...)` calls this function.

    Args:
        model: a `ViViTModel` or `ViViTForVideoClassification`.
        repo_id: `name` in your own namespace, or `namespace/name`.
        commit_message, commit_description: "Upload model" by default.
        private: whether a new repository is private; None leaves it to the Hub's default.
        token: None or True for the token that is stored on this machine.
        revision: the branch to push to, created if it does not exist.
        create_pr: open a pull request instead of committing.
        max_shard_size: weights above this size are split into files of at most this size.
        tags, base_model, license, datasets, metrics, report, results, protocol, distillation: for the model card,
            see `write_model_card`. Without `base_model` and `report`, those in the card of the folder or repository
            that the model was loaded from are used; without `distillation`, that of the folder.
        endpoint: also upload `handler.py` and `requirements.txt`, with which Hugging Face's Inference Endpoints label
            videos (see docs/serving.md).

    Returns:
        The commit: `str(...)` is its address, `.repo_url.repo_id` the full name of the repository.

    Raises:
        ValueError: with `private=True`, if the repository exists and is public; with `endpoint=True`, for a model
            without a classifier.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses a token, a name or write permission.
    """
    if endpoint:
        check_endpoint(model)
    api = HfApi(token=token)
    repo_id = _create_repo(api, repo_id, private)
    if revision is not None and not revision.startswith("refs/pr") and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if base_model is None and report is None:
        base_model, report = known_origin(model, repo_id)
    if distillation is None and os.path.isdir(model.name_or_path or ""):
        distillation = read_distillation(model.name_or_path)
    tags = [tags] if isinstance(tags, str) else [*(tags or [])]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with contextlib.suppress(EntryNotFoundError):  # a new repository has no card yet
            card = api.hf_hub_download(repo_id, "README.md", revision=revision)
            (folder / "README.md").write_bytes(Path(card).read_bytes())
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_model_card(
            folder,
            model,
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            datasets=datasets,
            metrics=metrics,
            tags=[*(model.model_tags or []), *tags],
            report=report,
            results=results,
            protocol=protocol,
            distillation=distillation,
        )
        if endpoint:
            write_endpoint(folder)
        about = {"commit_message": commit_message or "Upload model", "commit_description": commit_description}
        return upload(api, repo_id, sorted(folder.iterdir()), **about, revision=revision, create_pr=create_pr)


def _create_repo(api: HfApi, name: str, private: bool | None) -> str:
    """Create the repository unless it exists, and return its full name."""
    try:
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
    except HfHubHTTPError as error:
        error.append_to_message(f"\nThe repository {name!r} could be neither created nor found. {_way_out(error)}")
        raise
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"`private=True`, but the repository {repo_id!r} exists and is public. Make it private in its settings "
            "on the Hub, or push to another one."
        )
    return repo_id


def _way_out(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "The token is missing or not accepted: log in with `hf auth login`, or pass `token=`."
    if status == 403:
        return "The token has no write permission there: use one that has, or a namespace of your own."
    return "Names are `name` or `namespace/name`, of letters, digits, '-', '_' and '.', at most 96 of them."


def known_origin(model: Any, repo_id: str) -> tuple[str | None, Report | None]:
    """Return the base model and the initialisation report that the source of a loaded model states, else None."""
    source = model.name_or_path or ""
    if os.path.isdir(source):
        return read_initialisation(source)
    # A folder that has been deleted looks like a repository, but only downloaded files are in the cache.
    if source != repo_id and is_repo_id(source) and isinstance(try_to_load_from_cache(source, "config.json"), str):
        return source, None
    return None, None
