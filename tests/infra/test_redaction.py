"""Addresses that are shown, logged or stored: without passwords and tokens, and otherwise as they were."""

from __future__ import annotations

import json
import logging
import time

import pytest

from infra.redaction import RedactingFilter, name_of, redact, without_userinfo
from tasks.records import UserError

PASSWORD = "hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://admin:hunter2@127.0.0.1:9/x", "http://***@127.0.0.1:9/x"),
        ("HTTPS://admin:hunter2@host", "HTTPS://***@host"),
        ("http://admin:hun@hunter2@host/", "http://***@host/"),
        ("http://admin:hunter2%40%3A@host:1/?a=1", "http://***@host:1/?a=1"),
        ("http://:hunter2@host", "http://***@host"),
        ("https://hunter2@host/x", "https://***@host/x"),
        ("http://u:hunter2@[::1]:5000/a", "http://***@[::1]:5000/a"),
        ("s3://KEY:hunter2@bucket/data", "s3://***@bucket/data"),
        ("s3://KEY:se/hunter2/+x@bucket/data", "s3://***@bucket/data"),
        ("postgresql+psycopg2://u:hunter2@h/db", "postgresql+psycopg2://***@h/db"),
        ("postgresql://u:hunter2?#/@h/db", "postgresql://***@h/db"),
        ("postgresql://h/db?user=u&password=hunter2&sslmode=require", "postgresql://h/db?user=u&password=***&sslmode=require"),
        ("redis://:hunter2@h:6379/0", "redis://***@h:6379/0"),
        ("abfss://box:hunter2@account/x", "abfss://***@account/x"),
        ("zip://a.csv::https://u:hunter2@h/t.zip", "zip://a.csv::https://***@h/t.zip"),
        ("http://h/v.mp4?X-Amz-Date=1&X-Amz-Signature=hunter2", "http://h/v.mp4?X-Amz-Date=1&X-Amz-Signature=***"),
        ("http://h/v?x-goog-signature=hunter2#t=3", "http://h/v?x-goog-signature=***"),
        ("http://h/v?AWSAccessKeyId=hunter2&Expires=9", "http://h/v?AWSAccessKeyId=***&Expires=9"),
        ("http://h/v?a=1&amp;sig=hunter2%2F%2B&amp;b=2", "http://h/v?a=1&amp;sig=***&amp;b=2"),
        ("http://h/#access_token=hunter2", "http://h/#access_token=***"),
        ("failed with url: /p?token=hunter2 (Caused by x)", "failed with url: /p?token=*** (Caused by x)"),
        ("API request to http://admin:hunter2@h failed.", "API request to http://***@h failed."),
        ("see (http://h/a?key=hunter2), or http://b:hunter2@g.", "see (http://h/a?key=***), or http://***@g."),
        ("one http://a:hunter2@h\ntwo ftp://b:hunter2@g\n", "one http://***@h\ntwo ftp://***@g\n"),
        ("{'u': 'http://it's:hunter2@h'}", "{'u': 'http://***@h'}"),
        (r"http:\/\/u:hunter2@h\/x", r"http:\/\/***@h\/x"),
        ("http://h/?to=http%3A%2F%2Fu%3Ahunter2%40g%2Fx&n=1", "http://h/?to=http%3A%2F%2F***%40g%2Fx&n=1"),
    ],
)  # fmt: skip
def test_a_secret_is_hidden_in_every_spelling(text, shown):
    assert redact(text) == shown and redact(shown) == shown
    assert PASSWORD not in str(UserError(f"{text} is away"))
    for document in ({"a": text, "b": ["me@home.org", text]}, [text]):
        for separators in ((",", ":"), (", ", ": ")):
            hidden = redact(json.dumps(document, separators=separators))
            assert PASSWORD not in hidden and json.loads(hidden)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1/runs/2",
        "http://[::1]:5000/a@b",
        "http://host:8080/mail@home.org?page=2&tokenizer=clip&max_tokens=3",
        "https://host/a?monkey=3&keys=4",
        "postgresql+psycopg2://trip@127.0.0.1/mlflow",
        "abfss://box@account.dfs.core.windows.net/data",
        "github://organization:repository@main/table.csv",
        "hf://datasets/user/set@main/t.parquet",
        "sqlite:////home/me@work/mlflow.db",
        "models:/trip@champion",
        "/data/set-1?token",
        "s3://bucket/data/step-00000010",
        "me@home.org wrote to http://host, and so on",
        '["http://host","me@home.org"]',
        "",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(text):
    assert redact(text) == text and name_of(text) == text and str(UserError(text)) == text


@pytest.mark.parametrize(
    "piece",
    ["a", "http://", "http://a:", ":a@", "@", "?a", "?token=", "&", ".", ":\\", "\\'", "'", "%3A%2F%2F", "%40", "a.:/"],
)
@pytest.mark.parametrize("head", ["", "http://u:", "http://h/?token="])
def test_a_long_text_takes_linear_time(head, piece):
    text = head + piece * (400_000 // len(piece)) + "x"
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 3


def test_urls_that_differ_in_their_secret_keep_different_names():
    names = {name_of(f"http://host/v?key={key}") for key in ("hunter2", "hunter3")}
    assert len(names) == 2 and all(name.startswith("http://host/v?key=*** (sha256 ") for name in names)


def test_a_page_to_open_has_no_user_before_its_host():
    assert without_userinfo("http://u:hunter2@[::1]:5000/a?b#c") == "http://[::1]:5000/a?b#c"


def test_a_log_record_and_its_traceback_are_redacted(caplog):
    logger = logging.getLogger("test.redaction")
    redacting = RedactingFilter()
    logger.addFilter(redacting)
    try:
        raise ValueError("http://u:hunter2@h") from OSError("ftp://u:hunter2@g")
    except ValueError:
        logger.exception("at %s", "http://u:hunter2@h")
    finally:
        logger.removeFilter(redacting)
    assert PASSWORD not in caplog.text and "at http://***@h" in caplog.text and "OSError: ftp://***@g" in caplog.text
