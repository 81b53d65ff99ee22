"""What went wrong between us and the Hub, in a few words that say what to do.

`transformers` and `huggingface_hub` raise a chain of exceptions, some with ten lines of text. The kind of the failure
is somewhere in the chain; here it becomes the end of a sentence: "the expert 'a' could not be loaded from me/a: ...".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_zipit.errors import TOO_LARGE, ExpertError, OutOfMemoryError, ZipItError, is_out_of_memory
from hf_zipit.files.places import folder_of

LOG_IN = "log in with `hf auth login`"


@contextmanager
def told(what: str, source: str, revision: str | None = None, kind: type[ZipItError] = ExpertError) -> Iterator[None]:
    """Loads something of `source` inside: a failure becomes an error that begins with `what` and says why.

    It is of the given kind; what was raised is its cause. Memory that ran out is an `OutOfMemoryError`.
    """
    try:
        yield
    except ZipItError:
        raise
    except Exception as error:  # transformers raises whatever a damaged file makes it stumble over
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"{what}: {TOO_LARGE}") from error
        raise kind(f"{what}: {why(error, source, revision)}") from error


def why(error: BaseException, source: str, revision: str | None = None) -> str:
    """The reason why something of a repo id or folder could not be read or written: the `error` with its causes."""
    chain = list(_causes(error))

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if "Unrecognized model" in str(error):
        return "its config.json is missing, or names no kind of model that transformers knows"
    if "no file named model.safetensors" in str(error) or "`use_safetensors=True`" in str(error):
        return "it has no model.safetensors; other weights are not read, for a pickle can run code: save it again"
    if "Dataset scripts" in str(error):
        return "it is a loading script, which is code and is not run; give a folder that `save_to_disk` wrote"
    if folder_of(source) is not None:
        if isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
            return first_line(error)
        return f"its files are not what its class expects ({type(error).__name__}: {first_line(error)})"
    if is_a(OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and it was not downloaded before; unset it, or name a folder"
    if is_a(GatedRepoError):
        return f"the repo is gated; ask for access at {constants.ENDPOINT}/{source} and {LOG_IN}"
    if is_a(RepositoryNotFoundError):
        hint = _suggestion(source)
        return f"there is no folder and no repo of that name; check it{hint}, or {LOG_IN} if it is private"
    if is_a(RevisionNotFoundError):
        return f"the repo has no revision {revision!r}; name a branch, a tag or a commit of it"
    if is_a(LocalTokenNotFoundError):
        return f"nobody is logged in; {LOG_IN}"
    status = next((link.response.status_code for link in chain if isinstance(link, HfHubHTTPError)), None)
    if status in (401, 403):
        owner = source.partition("/")[0]
        whose = f"a token that may do it, a member's if {owner} is an organisation"
        return f"the Hub refuses it to this user; {LOG_IN} with {whose}"
    if is_a(HFValidationError):
        return "there is no such folder, and it is not a repo id, which is a name or user/name"
    if is_a(EntryNotFoundError) and not is_a(LocalEntryNotFoundError):
        return f"the repo lacks a file that is needed; {first_line(error)}"
    if is_a(LocalEntryNotFoundError, ConnectionError, TimeoutError) or _is_network(chain):
        return f"the Hub ({constants.ENDPOINT}) does not answer; check the network, or name a folder"
    if status is not None:
        return f"the Hub answered with the error {status}; try again later"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop, and what it announces; its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_network(chain: list[BaseException]) -> bool:
    """Whether one of them is an error of the HTTP client, whose package changes with huggingface_hub's version."""
    return any(type(link).__module__.partition(".")[0].startswith("http") for link in chain)


def _suggestion(source: str) -> str:
    """A folder beside the one that was named, if its name is close."""
    path = Path(source)
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
