"""The server's page in a real browser."""

from __future__ import annotations

import base64
import os
import pathlib
from typing import Any

import httpx
import pytest
from chromium import open_browser
from server_rig import MODEL, add_template, serve


def test_the_page_shows_what_runs(tmp_path: pathlib.Path) -> None:
    folder, profile = tmp_path / MODEL, tmp_path / "profile"
    folder.mkdir()
    body: dict[str, Any] = {"model": MODEL, "prompt": "A", "max_tokens": 500, "ignore_eos": True}
    with (
        serve(add_template(folder)) as server,
        open_browser(str(profile)) as browser,
        server.client() as client,
    ):
        text = "id => document.getElementById(id).textContent"
        browser.call("Page.navigate", url=server.url + "/")
        browser.wait("document.getElementById('state')?.textContent === 'live'")
        assert browser.evaluate(f"({text})('running')") == "0"
        assert browser.evaluate(f"({text})('model')") == MODEL
        # New requests keep starting, so that some always run; streams end when they are closed.
        for _ in range(200):
            with client.completions.create(
                model=MODEL, prompt="A", max_tokens=500, n=2, stream=True,
                extra_body={"ignore_eos": True},
            ) as chunks:  # fmt: skip
                for _ in chunks:
                    if browser.evaluate(f"Number(({text})('running'))"):
                        break
            if browser.evaluate("document.querySelectorAll('#requests tr').length"):
                break
        assert browser.evaluate("document.querySelectorAll('#requests tr').length") >= 1
        assert browser.evaluate("document.querySelectorAll('#chart polygon').length") >= 1
        blocks = browser.evaluate("document.querySelector('#requests tr').cells[2].textContent")
        assert int(blocks) >= 2
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200
        browser.wait(f"Number(({text})('speed')) > 0")
        browser.wait(f"({text})('running') === '0'")
        for width, scheme in ((390, "light"), (390, "dark"), (1000, "light")):
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=800, deviceScaleFactor=1, mobile=width < 500,
            )  # fmt: skip
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.call("Emulation.setEmulatedMedia", features=[feature])
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            color = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert color == ("rgb(18, 22, 28)" if scheme == "dark" else "rgb(244, 246, 249)")
            if wanted := os.environ.get("JAX_KVPAGE_SCREENSHOTS"):
                shot = browser.call("Page.captureScreenshot")["data"]
                file = pathlib.Path(wanted) / f"page-{width}-{scheme}.png"
                file.write_bytes(base64.b64decode(shot))
        for event in browser.events:
            assert event["method"] != "Runtime.exceptionThrown", event
            if event["method"] == "Network.requestWillBeSent":
                assert event["params"]["request"]["url"].startswith((server.url, "about:"))


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_pages_of_other_hosts_do_not_see_it(tmp_path: pathlib.Path, path: str) -> None:
    with serve(add_template(tmp_path), key="secret") as server:
        assert httpx.get(server.url + path, headers={"Host": "evil.example"}).status_code == 421
        assert httpx.get(server.url + path).status_code == 200
