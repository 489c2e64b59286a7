"""To the Hub: weights, configuration, the code that loads them anywhere, and a model card, in one commit."""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from .model_card import Report, is_repo_id, read_initialisation, write_model_card
from .model_files import is_weight_file, stale_weights_removed


# Where the Auto classes find ours in a saved folder, when this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_vivit.ViViTConfig",
    "AutoModel": "modeling_vivit.ViViTModel",
    "AutoModelForVideoClassification": "modeling_vivit.ViViTForVideoClassification",
}
# Larger files take longer to repeat when a transfer fails; transformers' own limit is 50 GB.
MAX_SHARD_SIZE = "5GB"


class HubPushMixin:
    """`save_pretrained` and `push_to_hub` for the ViViT models."""

    config: Any
    name_or_path: str
    model_tags: list[str] | None
    _auto_class: str | None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As `transformers.PreTrainedModel.save_pretrained`. The folder also gets the files that define the model, so that
        every Auto class loads it with `trust_remote_code=True` where this package is not installed. Weights of an
        earlier save in another layout, which `from_pretrained` might find first, are removed at the end.
        """
        if hasattr(self.config, "auto_map"):
            del self.config.auto_map  # of the checkpoint that it came from, which may have been of another class
        if self._auto_class is not None and type(self).__module__.rpartition(".")[2] == "modeling_vivit":
            self.config.auto_map = dict(AUTO_MAP)
        save: Any = super()
        if not (args[0] if args else kwargs.get("is_main_process", True)):  # nothing is written
            save.save_pretrained(save_directory, *args, **kwargs)
            return
        with stale_weights_removed(Path(save_directory)):
            save.save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(
        self,
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
    ) -> CommitInfo:
        """
        Uploads the model and a model card to a repository on the Hub, which is created if it is not there.

        Args:
            repo_id: `name` in your own namespace, or `namespace/name`.
            commit_message, commit_description: "Upload model" by default.
            private: whether a new repository is private; None leaves it to the Hub's default.
            token: None or True for the token that is stored on this machine.
            revision: the branch to push to, created if it is not there.
            create_pr: open a pull request instead of committing.
            max_shard_size: weights above this size are split into files of at most this size.
            tags, base_model, license, datasets, metrics, report, results, protocol: for the model card, see
                `write_model_card`. Without `base_model` and `report`, those in the card of the folder or the
                repository that the model was loaded from are taken over.

        Returns:
            The commit: `str(...)` is its address, `.repo_url.repo_id` the full name of the repository.

        Raises:
            ValueError: with `private=True`, if the repository is there and public.
            huggingface_hub.errors.HfHubHTTPError: what the Hub refuses: a token, a name, a missing permission.
        """
        api = HfApi(token=token)
        name = repo_id
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
        if revision is not None and not revision.startswith("refs/pr") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if base_model is None and report is None:
            base_model, report = self._known_origin(repo_id)
        tags = [tags] if isinstance(tags, str) else [*(tags or [])]

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with contextlib.suppress(EntryNotFoundError):  # a new repository has no card yet
                card = api.hf_hub_download(repo_id, "README.md", revision=revision)
                (folder / "README.md").write_bytes(Path(card).read_bytes())
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            write_model_card(
                folder,
                self,
                repo_id=repo_id,
                base_model=base_model,
                license=license,
                datasets=datasets,
                metrics=metrics,
                tags=[*(self.model_tags or []), *tags],
                report=report,
                results=results,
                protocol=protocol,
            )
            files = {path.name: path for path in sorted(folder.iterdir())}
            there = api.list_repo_files(repo_id, revision=revision)
            old = [name for name in there if name not in files and is_weight_file(name)]  # of an earlier push
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                    *(CommitOperationDelete(path_in_repo=name) for name in old),
                ],
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _known_origin(self, repo_id: str) -> tuple[str | None, Report | None]:
        """The base model and the initialisation report, if the model was loaded from where they are written down."""
        source = self.name_or_path or ""
        if os.path.isdir(source):
            return read_initialisation(source)
        # A folder that is gone would look like a repository; only what was downloaded is in the cache.
        if source != repo_id and is_repo_id(source) and isinstance(try_to_load_from_cache(source, "config.json"), str):
            return source, None
        return None, None


def _way_out(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "The token is missing or not accepted: log in with `hf auth login`, or pass `token=`."
    if status == 403:
        return "The token may not write there: use one with write permission, or a namespace of your own."
    return "Names are `name` or `namespace/name`, of letters, digits, '-', '_' and '.', at most 96 of them."
