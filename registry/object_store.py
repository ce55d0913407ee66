"""A folder of an S3 bucket, with the two things that make it safe to share: a PUT is whole or not at all, and a PUT can
be made on condition that the object is absent or still the one that was read.

The address and the credentials come from the environment, as boto3 reads them
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.config import ConfigError

SCHEME = "s3://"
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_CONDITION_FAILED = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_MISCONFIGURED = {"NoSuchBucket", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


class ObjectStoreUnavailable(OSError):
    """The store cannot be reached, or answers with an error of its own; a later try may succeed."""


@dataclass(frozen=True)
class Content:
    content: bytes
    etag: str


class ObjectFolder:
    """All objects below `uri` (s3://bucket/prefix). Names are relative to it, with slashes."""

    def __init__(self, uri: str, client: Any = None) -> None:
        if not uri.startswith(SCHEME) or not uri.removeprefix(SCHEME).partition("/")[0]:
            raise ConfigError(f"{uri!r} is no folder of an object store; expected s3://bucket/prefix")
        self.uri = uri.rstrip("/")
        self._bucket, _, self._prefix = self.uri.removeprefix(SCHEME).partition("/")
        self._client = client or _connect()

    def child(self, name: str) -> ObjectFolder:
        return ObjectFolder(f"{self.uri}/{name}", self._client)

    def read(self, name: str) -> Content | None:
        """None where there is no such object."""
        with self._asking(name) as answered:
            found = self._client.get_object(Bucket=self._bucket, Key=self._key(name))
            answered.append(Content(found["Body"].read(), found["ETag"]))
        return answered[0] if answered else None

    def exists(self, name: str) -> bool:
        with self._asking(name) as answered:
            answered.append(self._client.head_object(Bucket=self._bucket, Key=self._key(name)))
        return bool(answered)

    def write_if(self, name: str, content: bytes, *, etag: str | None) -> bool:
        """Writes it if the object still has this ETag, or is absent for None; False where it is otherwise."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with self._asking(name) as answered:
            answered.append(
                self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content, **condition)
            )
        return bool(answered)

    def upload(self, path: Path, name: str) -> None:
        with self._asking(name):
            self._client.upload_file(str(path), self._bucket, self._key(name))

    def download(self, name: str, path: Path) -> None:
        """The file, complete under its name or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with self._asking(name) as answered:
            self._client.download_file(self._bucket, self._key(name), str(partial))
            answered.append(partial)
        if not answered:
            raise FileNotFoundError(f"{self.uri}/{name} does not exist")
        partial.replace(path)

    def delete(self, name: str) -> None:
        with self._asking(name):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(name))

    def names(self) -> Iterator[str]:
        """Of every object below, sorted."""
        start = f"{self._prefix}/" if self._prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start)
        found: list[str] = []
        with self._asking(""):
            found = [item["Key"].removeprefix(start) for page in pages for item in page.get("Contents", [])]
        yield from sorted(found)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextmanager
    def _asking(self, name: str) -> Iterator[list[Any]]:
        """The list stays empty where the object is absent, or where a condition does not hold."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.uri}/{name}"
        try:
            yield []
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in _MISCONFIGURED:
                raise ConfigError(
                    f"{where}: the object store says {code}: {error.response['Error']['Message']}"
                ) from error
            if code not in _ABSENT | _CONDITION_FAILED:
                raise ObjectStoreUnavailable(f"{where}: the object store says {code}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise ObjectStoreUnavailable(f"{where} cannot be reached: {error}") from error


def _connect() -> Any:
    try:
        import boto3
    except ImportError as error:
        raise ConfigError("an s3:// folder needs boto3: pip install 'medusa-on-ray[cluster]'") from error
    return boto3.client("s3")
