"""The page at /, in a real browser: headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from codecs import getincrementaldecoder
from contextlib import ExitStack

import httpx
import pytest
from websockets.sync.client import connect

from deployments.api import build_api
from deployments.token_texts import TokenTexts

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("REQUIRE_SERVICES"),
    reason="no chromium here (Debian: apt install chromium)",
)


class Browser:
    """One page of a headless browser: opens URLs and evaluates JavaScript in them."""

    def __init__(self, profile):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        where = [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, *where], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port_file = profile / "DevToolsActivePort"
        wait_until(lambda: port_file.exists() and port_file.read_text().count("\n"), 60)
        port = port_file.read_text().splitlines()[0]
        pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=30).json()
        self._opened = ExitStack()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._socket = self._opened.enter_context(connect(address))
        self._number = 0
        self.complaints = []
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url):
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression):
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression, seconds=30):
        wait_until(lambda: self.evaluate(expression), seconds)

    def close(self):
        self._opened.close()
        self._process.terminate()
        self._process.wait(20)

    def _call(self, method, **params):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(message["params"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path)
    yield browser
    browser.close()


def ask(browser, prompt, mode="chat", limit=40):
    browser.evaluate(
        f"at('prompt').value = {json.dumps(prompt)}; at('mode').value = '{mode}'; at('limit').value = {limit};"
        "at('send').click(); true"
    )


@needs_browser
def test_a_prompt_is_answered_with_the_kept_guesses_marked(browser, async_engine, tokenizer, scripted, serve_live):
    text = tokenizer.decode(scripted.script[:40])
    browser.open(serve_live(build_api(async_engine, tokenizer, "tiny")))
    browser.wait_for("at('model').textContent.startsWith('tiny')")
    for mode in ("chat", "text"):
        ask(browser, "hello", mode)
        browser.wait_for("at('tokens').textContent === '40' && !running")
        assert browser.evaluate("at('reply').textContent") == text
        # The prefill gives one token, then steps of three: two guesses and the model's own; the last step keeps all.
        assert browser.evaluate("at('steps').textContent") == "13"
        assert browser.evaluate("at('perstep').textContent") == "3.00"
        kept = browser.evaluate("[...document.querySelectorAll('#reply .kept')].map(span => span.textContent).join('')")
        decoder, texts = getincrementaldecoder("utf-8")(), TokenTexts(tokenizer.hf)
        shown = [decoder.decode(texts.to_bytes(token)) for token in scripted.script[:40]]
        assert kept == "".join(text for i, text in enumerate(shown) if i and (i - 1) % 3 < 2)
        assert browser.evaluate("document.querySelectorAll('#chart rect.kept').length") == 13
        assert re.fullmatch(r"\d+ ms", browser.evaluate("at('first').textContent"))
        assert int(browser.evaluate("at('speed').textContent")) > 0
    assert not browser.complaints


@needs_browser
def test_errors_are_shown_and_nothing_of_a_reply_is_markup(browser, async_engine, tokenizer, scripted, serve_live):
    scripted.script = tokenizer.encode("<img src=x onerror=alert(1)>")
    browser.open(serve_live(build_api(async_engine, tokenizer, "tiny")))
    ask(browser, "hello", limit=len(scripted.script))
    browser.wait_for("at('send').textContent === 'Send' && at('tokens').textContent !== '–'")
    assert "<img src=x" in browser.evaluate("at('reply').textContent")
    assert browser.evaluate("document.querySelectorAll('#reply img').length") == 0
    ask(browser, "x" * 3000)
    browser.wait_for("!!document.querySelector('#reply .error')")
    assert "holds 256" in browser.evaluate("at('reply').textContent")


@needs_browser
def test_stop_ends_the_reply_at_the_service_too(browser, async_engine, tokenizer, scripted, serve_live):
    scripted.pause_after = 3
    browser.open(serve_live(build_api(async_engine, tokenizer, "tiny")))
    ask(browser, "hello", limit=200)
    browser.wait_for("at('tokens').textContent !== '–'")
    browser.evaluate("at('send').click(); true")
    browser.wait_for("at('send').textContent === 'Send'")
    wait_until(lambda: not async_engine._open, 10)
    scripted.gate.set()
    wait_until(lambda: scripted.aborted and not scripted.has_unfinished(), 10)


async def test_the_page_is_one_file_that_loads_nothing(async_engine, tokenizer):
    transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:|//)", response.text)
