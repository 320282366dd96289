"""Secrets in URLs: those that are refused in specs, and those that are not displayed."""

import pytest

from mlprune.spec.urls import redact, scheme_only, storage_has_secret, tracking_has_secret, without_credentials

WITH_SECRETS = [
    "http://me:hunter2@server:5000",
    "https://hunter2@server",
    "HTTPS://me:hunter2@server",
    "postgresql://me:hunter2@db/mlflow",
    "postgresql+psycopg2://me:hun/hunter2@db/mlflow",
    "mysql://:hunter2@db/mlflow",
    "postgresql://db/mlflow?user=me&password=hunter2",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dhunter2",
]
WITHOUT = [
    "http://server:5000/a@b",
    "postgresql://me@db/mlflow?sslmode=require",
    "sqlite:////home/me@work:1/a@b.db",
    "databricks",
]


@pytest.mark.parametrize(
    ("uri", "displayed"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://me:pw@host:5000/a", "https://me:***@host:5000/a"),
        ("postgresql+psycopg2://me:p@w/x:y@host/db", "postgresql+psycopg2://me:***@host/db"),
        (
            "postgresql://host/db?user=me&password=pw&sslmode=off",
            "postgresql://host/db?user=me&password=***&sslmode=off",
        ),
        ("sqlite:////a:b@c/mlflow.db", "sqlite:////a:b@c/mlflow.db"),
        ("at http://me:pw@host/a, and mail a@b", "at http://me:***@host/a, and mail a@b"),
    ],
)
def test_no_password_is_displayed(uri: str, displayed: str) -> None:
    assert redact(uri) == displayed


@pytest.mark.parametrize("uri", WITH_SECRETS)
def test_secrets_of_tracking_uris_are_noticed_and_not_displayed(uri: str) -> None:
    assert tracking_has_secret(uri)
    assert "hunter2" not in scheme_only(uri)
    assert scheme_only(uri).endswith("://...")


@pytest.mark.parametrize("uri", WITHOUT)
def test_tracking_uris_without_secrets_are_accepted(uri: str) -> None:
    assert not tracking_has_secret(uri)


@pytest.mark.parametrize(
    ("address", "secret"),
    [
        ("s3://bucket/x", False),
        ("/home/me@work?/x", False),  # a folder
        ("s3://KEY:secret@bucket/x", True),
        ("gs://bucket/x?token=secret", True),
    ],
)
def test_addresses_of_object_stores_have_no_user_and_no_query(address: str, secret: bool) -> None:
    assert storage_has_secret(address) is secret


@pytest.mark.parametrize("url", ["me:hunter2@host", "me:hunter2://host", ""])
def test_text_that_is_no_url_is_not_displayed(url: str) -> None:
    assert scheme_only(url) == "..."


def test_credentials_are_left_out() -> None:
    assert without_credentials("http://me:pw@host:5000/") == "http://host:5000/"
    assert without_credentials("http://host:5000/") == "http://host:5000/"
