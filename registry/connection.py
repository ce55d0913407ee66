"""Reaching MLflow, and telling apart "it is down" from "it said no"."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own defaults (120 s, 7 retries) would hold a caller for minutes; ours retry at a higher level.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would tear progress bars
}
_PROBE_TIMEOUT_S = 5.0
_STORE_LIBRARIES = {"boto3", "botocore", "google", "azure"}  # each with exceptions of its own
_ANSWERS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}


class MlflowUnavailable(RuntimeError):
    """MLflow, its database or its artifact store cannot be reached; a later try may succeed."""


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and registry at `uri`; the environment may set other request limits."""
    from mlflow import MlflowClient  # a second to import, and it starts a thread: only where it is used

    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    with reaching(uri):
        _probe(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turns what a lost server, database or artifact store raises into MlflowUnavailable.

    MLflow's answers (an unknown name, a value it refuses) pass unchanged, as MlflowException.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        if error.error_code in _ANSWERS:
            raise
        raise MlflowUnavailable(_message(uri, error)) from error
    except (OSError, SQLAlchemyError) as error:
        raise MlflowUnavailable(_message(uri, error)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _STORE_LIBRARIES:
            raise
        raise MlflowUnavailable(_message(uri, error)) from error


def shown(uri: str) -> str:
    """The URI without credentials, for messages."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if "@" in rest else uri


def _probe(uri: str) -> None:
    """Fails within seconds where a connection would hang."""
    if not uri.startswith(("http://", "https://")):
        return
    import requests

    requests.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_TIMEOUT_S)


def _message(uri: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"MLflow at {shown(uri)} cannot be reached: {first_line}"
