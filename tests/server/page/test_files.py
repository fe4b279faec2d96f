"""The files of the web page as they are served: types, headers, nothing but what is listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tenfold.server import page

STATIC = Path(page.__file__).parent / "static"
FILES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=page.routes()))


def url(name: str) -> str:
    return "/" if name == "index.html" else f"/static/{name}"


def test_every_file_is_served_and_no_other() -> None:
    assert sorted(route.path for route in page.routes()) == sorted(url(name) for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_files_come_with_type_and_policy(client: TestClient, name: str) -> None:
    answer = client.get(url(name))
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.status_code == 200
    assert answer.content == (STATIC / name).read_bytes()
    assert answer.headers["content-type"].split(";")[0] == kinds[name.rsplit(".")[-1]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/")
    tag = first.headers["etag"]
    for asked in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get("/", headers={"If-None-Match": asked})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert first.headers["cache-control"] == "no-cache"


def test_head_and_other_methods(client: TestClient) -> None:
    head = client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str((STATIC / "index.html").stat().st_size)
    assert client.post("/", content=b"x").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static",
        "/static/../page.py",
        "/static/..%2fpage.py",
        "/static/%2e%2e/page.py",
        "/static//app.js",
        "/static/app.js/",
        "/static/app.js%00",
        "/static/index.html",
        "/static/APP.JS",
        "/static/.hidden",
    ],
)
def test_no_other_path_leads_to_a_file(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code in (307, 404)
    assert client.get(path).status_code in (200, 404)
    if client.get(path).status_code == 200:  # a slash too many leads to the listed file itself
        assert client.get(path).content == (STATIC / "app.js").read_bytes()


def test_the_page_holds_nothing_inline_and_nothing_from_elsewhere() -> None:
    text = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<script(?![^>]*\bsrc=)", text)
    assert not re.findall(r"<style|\sstyle=|\son\w+=|javascript:|https?:|\bsrc=\"//", text)
    named = re.findall(r'(?:src|href)="(/[^"]*)"', text)
    assert {name.removeprefix("/static/") for name in named} == {"app.js", "style.css", "icon.svg"}
    css = (STATIC / "style.css").read_text(encoding="utf-8")
    assert "url(" not in css
    assert "@import" not in css


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_make_no_markup_from_text_and_run_none(name: str) -> None:
    """The policy forbids it in the browser; here it is not even tried."""
    text = (STATIC / name).read_text(encoding="utf-8")
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|importScripts"
    assert not re.findall(banned, text)
    sources = re.findall(r"^import .* from \"(.*)\";$", text, re.MULTILINE)
    assert len(sources) == len(re.findall(r"\bimport\b.*\bfrom\b", text))
    assert {source.removeprefix("/static/") for source in sources} <= set(SCRIPTS)
    assert not re.findall(r"https?://(?!\[\^|/)", re.sub(r"/\S*https\?\S*/[gimsuy]*", "", text))
