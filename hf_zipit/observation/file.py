"""Files of sums that were gathered from data: tensors with a header that says whose they are, and a checksum."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_zipit.errors import DataError, OutputError
from hf_zipit.experts.fingerprint import digest_tensors
from hf_zipit.files import replacing
from hf_zipit.hub.reasons import first_line

Header = dict[str, Any]


def write(path: str | Path, what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write one safetensors file; it replaces an older one only when it is complete. Raises OutputError if it cannot.

    `what` is a word for the content; the header holds plain values, its `format` among them.
    """
    path, header = Path(path), dict(header)
    header["sha256"] = checksum(header, tensors)
    try:
        with replacing(path) as beside:
            save_file(dict(tensors), beside, metadata={"hf_zipit": json.dumps(header)})
    except SafetensorError as error:
        raise OutputError(f"The {what} cannot be written to {path}: {error}.") from error
    return path


@contextmanager
def reading(path: str | Path, what: str, form: str) -> Iterator[tuple[Header, dict[str, Tensor]]]:
    """Header and tensors of a file of `write`; what their reader stumbles over inside is told as a fault of the file.

    Raises:
        DataError: if there is no such file, or it has another format or is not whole or was changed.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"There is no {what} file at {path}.")
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["hf_zipit"])
            if header["format"] != form:
                raise DataError(f"{path} has the format {header['format']}; this version reads {form}.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if header["sha256"] != checksum(header, tensors):
            raise DataError(f"{path} was changed since it was written (its checksum differs); observe again.")
        yield header, tensors
    except DataError:
        raise
    except Exception as error:  # whatever its readers stumble over in a file that is none
        raise DataError(f"{path} is not a complete {what} file: {first_line(error)}.") from error


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of everything in a file."""
    told = json.dumps({key: value for key, value in header.items() if key != "sha256"}, sort_keys=True)
    return digest_tensors(((name, tensors[name]) for name in sorted(tensors)), label=told)
