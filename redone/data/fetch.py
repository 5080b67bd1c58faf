"""Public data sets for users outside: address, sha256 and licence of each file."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from redone.errors import DataError

TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20

GITHUB = "https://raw.githubusercontent.com"
HUMANEVAL = f"{GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data"
GSM8K = f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
COLD = f"{GITHUB}/thu-coai/COLDataset/a0c55a945497ab58e94aef491180e1cf88ffb864/COLDataset"
GOOGLE = f"{GITHUB}/google-research/google-research/master"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    url: str
    sha256: str

    @property
    def name(self) -> str:
        return Path(urlsplit(self.url).path).name


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    name: str
    about: str
    licence: str
    files: tuple[RemoteFile, ...]


def _files(base: str, **hashes: str) -> tuple[RemoteFile, ...]:
    """hashes: file name with "__" for the dot -> sha256."""
    return tuple(RemoteFile(url=f"{base}/{name.replace('__', '.')}", sha256=h) for name, h in hashes.items())


_ALL = (
    Dataset(
        name="cold",
        about="COLDataset: Chinese offensive language, 25,726 / 6,431 / 5,323 posts",
        licence="Apache-2.0",
        files=_files(
            COLD,
            train__csv="16ca7955bdcaf90f5d8ac39e51eb3eda15320caa1e730ed45cb5e8ca8cd0d5e8",
            dev__csv="28e67a26815aa1852449ba06919e51c07060d146e2bd23101cc0137a0ff94b7c",
            test__csv="b06d31481f0d558b6dc8140408938abe8dba8083cd9976b4ba8f5c837fbe78ed",
        ),
    ),
    Dataset(
        name="gsm8k",
        about="GSM8K: grade-school maths with rationales, 7,473 / 1,319 problems",
        licence="MIT",
        files=_files(
            GSM8K,
            train__jsonl="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            test__jsonl="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
    ),
    Dataset(
        name="humaneval",
        about="HumanEval: 164 Python problems with unit tests",
        licence="MIT",
        files=_files(
            HUMANEVAL, HumanEval__jsonl__gz="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
        ),
    ),
    Dataset(
        name="mbpp",
        about="MBPP: 974 Python problems with asserts",
        licence="CC-BY-4.0",
        files=_files(
            f"{GOOGLE}/mbpp", mbpp__jsonl="ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
        ),
    ),
    Dataset(
        name="ifeval",
        about="IFEval: 541 prompts with verifiable instructions",
        licence="Apache-2.0",
        files=_files(
            f"{GOOGLE}/instruction_following_eval/data",
            input_data__jsonl="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
        ),
    ),
)
DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in _ALL}


def fetch_dataset(name: str, dest: Path, datasets: Mapping[str, Dataset] = DATASETS) -> list[Path]:
    """Download every file of a data set into `dest`; files that are there with the right hash are kept.

    Raises DataError on an unknown name, without network, or when a hash differs (nothing is left behind).
    """
    if name not in datasets:
        raise DataError(f"data set {name!r} is unknown; known: {', '.join(datasets)}")
    paths = []
    for file in datasets[name].files:
        path = dest / file.name
        if not (path.is_file() and _sha256(path) == file.sha256):
            _download(file, path)
        paths.append(path)
    (dest / "LICENSE.note").write_text(f"{name}: {datasets[name].licence}\n", encoding="utf-8")
    return paths


def _download(file: RemoteFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT_S) as source, partial.open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise DataError(
                f"{file.url}: sha256 is {digest.hexdigest()}, expected {file.sha256}; the address "
                f"serves another version. Put the right file at {path} by hand"
            )
        os.replace(partial, path)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"cannot download {file.url}: {reason}; remedy: check the network, or put it at {path}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
