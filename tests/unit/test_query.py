"""The S3 access that queries give DuckDB."""

from collections.abc import Mapping

import pytest

from k2flow.query.connection import s3_secret

KEYS = {"s3.access-key-id": "me", "s3.secret-access-key": "it's"}


@pytest.fixture(autouse=True)
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)


@pytest.mark.parametrize(
    ("properties", "options"),
    [
        ({}, ""),
        (KEYS, ", KEY_ID 'me', SECRET 'it''s'"),
        (
            {**KEYS, "s3.session-token": "t", "s3.region": "r"},
            ", KEY_ID 'me', SECRET 'it''s', SESSION_TOKEN 't', REGION 'r'",
        ),
        ({"client.access-key-id": "c", "client.region": "r"}, ", KEY_ID 'c', REGION 'r'"),
        ({"s3.endpoint": "http://h:9/"}, ", ENDPOINT 'h:9', USE_SSL 'false', URL_STYLE 'path'"),
        ({"s3.endpoint": "https://h"}, ", ENDPOINT 'h', USE_SSL 'true', URL_STYLE 'path'"),
        (
            {"s3.endpoint": "h:9", "s3.force-virtual-addressing": "True"},
            ", ENDPOINT 'h:9', USE_SSL 'true', URL_STYLE 'vhost'",
        ),
    ],
)
def test_secret(properties: Mapping[str, str], options: str) -> None:
    assert s3_secret("t", "s3://b/t", properties) == f"CREATE SECRET \"t\" (TYPE 's3', SCOPE 's3://b/t'{options})"


def test_keys_that_the_catalog_lacks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of two sources are never mixed."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "env")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "there")
    assert "KEY_ID 'env', SESSION_TOKEN 'token', REGION 'there'" in s3_secret("t", "s3://b", {})
    assert s3_secret("t", "s3://b", KEYS).endswith("KEY_ID 'me', SECRET 'it''s', REGION 'there')")
