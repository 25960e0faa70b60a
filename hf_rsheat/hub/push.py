"""Push an exported folder to the Hub: verified before it leaves, and again as it comes back."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from hf_rsheat.errors import ConfigurationError, HFRSHeatError, TransferError, VerificationError
from hf_rsheat.hub.records import MANIFEST, sha256, visible_files
from hf_rsheat.hub.transfer import patiently, pause, reason
from hf_rsheat.hub.verify import Report, verify

logger = logging.getLogger(__name__)

MAIN = "main"
TITLE = "Upload with hf_rsheat"  # of commits and pull requests; how an earlier pull request is found again

Status = Literal["added", "changed", "removed", "same"]


@dataclass(frozen=True)
class Change:
    """What a push does to one file; size in bytes, as it is after the push (before it, if removed)."""

    path: str
    status: Status
    size: int


@dataclass(frozen=True)
class PushResult:
    """What a push did, or would do.

    Attributes:
        repo_id: `user/name`.
        changes: One entry per file, by path.
        created: Whether the repository is new.
        revision: Commit that holds the folder; None in a dry run that would change something.
        committed: Whether a commit was made; False if the repository held the folder already, and in a dry run.
        pull_request: Its address, if it was asked for and there is a difference to `main`.
        report: Checks of the revision as downloaded again; None in a dry run.
    """

    repo_id: str
    changes: tuple[Change, ...]
    revision: str | None = None
    committed: bool = False
    created: bool = False
    pull_request: str | None = None
    report: Report | None = None

    def __str__(self) -> str:
        lines = [
            f"  {change.status:<8} {tqdm.format_sizeof(change.size, 'B'):>7}  {change.path}"
            for change in self.changes
            if change.status != "same"
        ]
        same = sum(change.status == "same" for change in self.changes)
        new = " (new repository)" if self.created else ""
        return "\n".join([f"{self.repo_id}{new}:", *lines, f"  same     {same} of {len(self.changes)} files"])


@dataclass(frozen=True)
class _Target:
    """Where to push to, and as whom."""

    api: HfApi
    repo_id: str
    branch: str
    create_pr: bool


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> PushResult:
    """Make a revision of a model repository equal to an exported folder.

    Nothing is sent that does not verify, nothing is sent twice, and nothing new means no commit: the same call goes on
    where an interrupted one stopped. Afterwards the revision is downloaded into an empty cache and verified.

    Args:
        folder: A folder written by `export`, a converter or training.
        repo_id: `user/name`. Created if need be.
        private: Whether to create it private; None leaves it to the account's settings.
        create_pr: Open a pull request instead of committing to `main`.
        revision: Branch to commit to instead of `main`. Created if need be.
        dry_run: Only compare.
        token: Hugging Face token; taken from the usual places (`hf auth login`, `HF_TOKEN`) if not given.

    Raises:
        ConfigurationError: Options that contradict each other or the repository, or no token.
        TransferError: The Hub refused, or kept failing. The same call goes on.
        VerificationError: The folder does not verify, and nothing was sent; the repository holds files of others; or
            what came back from the Hub is not what was sent.
    """
    folder = Path(folder)
    _check_options(folder, repo_id, create_pr, revision)
    _require_verified(folder)
    secret = token or get_token()
    if secret is None and not dry_run:
        raise ConfigurationError("There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=secret, library_name="hf_rsheat", library_version=version("hf_rsheat"))
    target = _Target(api, repo_id, revision or MAIN, create_pr)
    with _understandable_errors(repo_id, secret):
        head = patiently(lambda: _head(target))
        if private and head is not None and not patiently(lambda: api.model_info(repo_id)).private:
            raise ConfigurationError(f"{repo_id} is public already: change that in its settings on the Hub, then push.")
        if dry_run:
            return PushResult(repo_id, _compare(target, folder, head), created=head is None)
        patiently(lambda: _create_what_is_missing(target, private, head))
        result = replace(_make_equal(target, folder), created=head is None)
        return replace(result, report=_check_arrival(target, folder, result.revision))


def _check_options(folder: Path, repo_id: str, create_pr: bool, revision: str | None) -> None:
    if not folder.is_dir():
        raise ConfigurationError(f"There is no folder '{folder}'.")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ConfigurationError(f"'{repo_id}' is no repository name 'user/name': {error}") from error
    if "/" not in repo_id:
        raise ConfigurationError(f"'{repo_id}' names no owner: give 'user/{repo_id}'.")
    if create_pr and revision is not None:
        raise ConfigurationError("A pull request goes to the main branch: give create_pr or revision, not both.")


def _require_verified(folder: Path) -> None:
    report = verify(folder)
    if report.is_plain:
        raise VerificationError(
            f"{folder} is a plain save_pretrained folder: run `hf-rsheat export` on it and push the result."
        )
    if not report.ok:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if check.status != "passed")
        raise VerificationError(f"{folder} does not verify, so nothing was pushed. {failed}")


@contextmanager
def _understandable_errors(repo_id: str, secret: str | None) -> Iterator[None]:
    try:
        yield
    except HFRSHeatError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # No chain: the original may hold signed addresses, or the token if the server echoed it.
        raise TransferError(
            f"The push to {repo_id} stopped: {reason(error, secret)} Run the same command again to go on; what "
            "arrived is not sent again."
        ) from None


def _head(target: _Target) -> str | None:
    """Commit to build on; None if the repository does not exist. A new branch starts from `main`."""
    try:
        try:
            return target.api.model_info(target.repo_id, revision=target.branch).sha
        except RevisionNotFoundError:
            return target.api.model_info(target.repo_id, revision=MAIN).sha
    except RepositoryNotFoundError:
        return None


def _create_what_is_missing(target: _Target, private: bool | None, head: str | None) -> None:
    if head is None:
        target.api.create_repo(target.repo_id, private=private, exist_ok=True)
    if target.branch != MAIN and not target.branch.startswith("refs/"):
        target.api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)


def _compare(target: _Target, folder: Path, revision: str | None) -> tuple[Change, ...]:
    """What has to change to make a revision equal to the folder.

    Only files that an earlier export wrote are removed; others would keep the revision from verifying.
    """
    remote = _files(target, revision) if revision else {}
    local = visible_files(folder)
    surplus = set(remote) - local
    foreign = sorted(surplus - _files_of_manifest(target, revision)) if MANIFEST in remote else sorted(surplus)
    if foreign:
        raise VerificationError(
            f"{target.repo_id} holds files that are not of this folder and that no export of it wrote: "
            f"{', '.join(foreign)}. Remove them on the Hub, or push to another repository or branch."
        )
    changes = [Change(path, "removed", remote[path].size) for path in surplus]
    for path in local:
        if path not in remote:
            status: Status = "added"
        else:
            status = "same" if _is_same(folder / path, remote[path]) else "changed"
        changes.append(Change(path, status, (folder / path).stat().st_size))
    return tuple(sorted(changes, key=lambda change: change.path))


def _files(target: _Target, revision: str) -> dict[str, RepoFile]:
    """Files of a revision, without `.gitattributes` and the like."""
    entries = target.api.list_repo_tree(target.repo_id, revision=revision, recursive=True)
    files = (entry for entry in entries if isinstance(entry, RepoFile))
    return {file.path: file for file in files if not any(part.startswith(".") for part in file.path.split("/"))}


def _files_of_manifest(target: _Target, revision: str | None) -> set[str]:
    """Paths that an earlier export put into the repository."""
    with tempfile.TemporaryDirectory() as cache:
        path = target.api.hf_hub_download(target.repo_id, MANIFEST, revision=revision, cache_dir=cache)
        content = Path(path).read_bytes()
    try:
        return {*json.loads(content)["files"], MANIFEST, "README.md"}
    except (ValueError, KeyError, TypeError):
        return set()  # not a manifest of ours: every file is somebody else's


def _is_same(path: Path, remote: RepoFile) -> bool:
    if path.stat().st_size != remote.size:
        return False
    if remote.lfs is not None:
        return sha256(path) == remote.lfs.sha256
    return git_hash(path.read_bytes()) == remote.blob_id


def _make_equal(target: _Target, folder: Path) -> PushResult:
    """Commit the difference, through passing failures.

    Before every try the repository is looked at again, so that neither a commit whose answer was lost is made twice,
    nor a commit of somebody else overwritten unseen.
    """
    failures, first = 0, None
    while True:
        try:
            head = _head(target)
            changes = _compare(target, folder, head)
            found = PushResult(target.repo_id, first or changes, head, committed=first is not None)
            if all(change.status == "same" for change in changes):
                return found
            earlier = _earlier_pull_request(target, folder) if target.create_pr else None
            if earlier is not None:
                return replace(found, revision=earlier.revision, pull_request=earlier.pull_request)
            first = first or changes
            logger.info("%s", PushResult(target.repo_id, changes))
            commit = target.api.create_commit(
                target.repo_id,
                _operations(folder, changes),
                commit_message=f"{TITLE} {version('hf_rsheat')}",
                revision=target.branch,
                create_pr=target.create_pr,
                parent_commit=head,
            )
            return replace(found, changes=first, revision=commit.oid, committed=True, pull_request=commit.pr_url)
        except (HTTPError, OSError, ValueError) as error:
            pause(error, failures)
            failures += 1


def _operations(folder: Path, changes: tuple[Change, ...]) -> list[CommitOperationAdd | CommitOperationDelete]:
    return [
        CommitOperationDelete(change.path, is_folder=False)
        if change.status == "removed"
        else CommitOperationAdd(change.path, folder / change.path)
        for change in changes
        if change.status != "same"
    ]


def _earlier_pull_request(target: _Target, folder: Path) -> PushResult | None:
    """An open pull request that holds the folder already: of an earlier call, or one whose answer was lost."""
    open_requests = target.api.get_repo_discussions(
        target.repo_id, discussion_type="pull_request", discussion_status="open"
    )
    for request in open_requests:
        if not request.title.startswith(TITLE) or not request.git_reference:
            continue
        head = target.api.model_info(target.repo_id, revision=request.git_reference).sha
        try:
            changes = _compare(target, folder, head)
        except VerificationError:  # it holds other files
            continue
        if all(change.status == "same" for change in changes):
            return PushResult(target.repo_id, changes, head, pull_request=request.url)
    return None


def _check_arrival(target: _Target, folder: Path, revision: str | None) -> Report:
    """Download a revision into an empty cache, compare it byte by byte with the folder, and verify it."""
    with tempfile.TemporaryDirectory() as cache:
        snapshot = Path(
            patiently(lambda: target.api.snapshot_download(target.repo_id, revision=revision, cache_dir=cache))
        )
        sent, arrived = visible_files(folder), visible_files(snapshot)
        wrong = sent ^ arrived | {name for name in sent & arrived if sha256(folder / name) != sha256(snapshot / name)}
        report = verify(snapshot)
    if wrong or not report.ok:
        details = [f"not as sent: {', '.join(sorted(wrong))}"] if wrong else []
        details += [f"{check.name}: {check.detail}" for check in report.failed]
        raise VerificationError(
            f"{target.repo_id}@{revision} came back from the Hub damaged ({'; '.join(details)}). Run the same command "
            "again: it sends nothing that is there, and checks again."
        )
    return replace(report, folder=folder)
