"""The page in a real browser: it draws, turns, asks nobody for anything and complains about nothing."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.report.page import write_page
from minimind_data.report.statistics import stats
from minimind_data.tokenizer.loading import load_tokenizer

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror=\'document.title = "taken"\'>'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]


class Browser:
    """Chromium without a window, spoken to in the DevTools protocol over two pipes.

    The browser reads commands from descriptor 3 and writes answers to descriptor 4, each ended by a zero byte.
    """

    def __init__(self, profile):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # A small Python puts the pipes where the browser looks for them and becomes the browser.
        become = (
            "import fcntl, os, sys\n"
            "ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]\n"
            "os.dup2(ends[0], 3); os.dup2(ends[1], 4)\n"
            "os.execv(sys.argv[3], sys.argv[3:])\n"
        )
        command = [sys.executable, "-c", become, str(to_browser), str(from_browser), BROWSER, "--headless"]
        command += ["--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._last = 0
        self._session = None
        self.events = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def send(self, method, **params):
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            block = os.read(self._in, 2**16)
            assert block, "the browser ended"
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        self.send("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, code):
        """Return the value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def show(self, *, width=1200, height=900, dark=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def photograph(self, path, whole=True):
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(picture["data"]))

    def seen(self, *methods):
        return [event for event in self.events if event["method"] in methods]


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture
def page(tmp_path, write_jsonl):
    """A page of 40 windows of 16 tokens in each layout, the first document hostile, some characters cut."""
    texts = [HOSTILE, *(f"第{i}章 𠮷野家 line\nnext \u202e" for i in range(39))]
    tokenize([write_jsonl(texts)], TokenizeOptions(out=tmp_path / "d", workers=1))
    shards = ShardSet.open(tmp_path / "d")
    tokenizer = load_tokenizer(tmp_path / "d")
    told = stats(shards, tokenizer, [16, 64]).as_dict()
    write_page(tmp_path / "page.html", told, shards, tokenizer, num_windows=40)
    return tmp_path / "page.html"


WHERE = "document.getElementById('where').textContent"


def test_the_page_draws_turns_and_asks_nobody(browser, page):
    browser.open(page.as_uri())
    assert browser.run("document.title") == "d: what is in it"
    assert browser.run("document.querySelectorAll('#plot rect.bar').length") == 3
    assert browser.run("document.querySelectorAll('#waste tr').length") == 6
    assert browser.run("document.querySelectorAll('img, iframe').length") == 0
    assert browser.run(WHERE).startswith("Window 0 of ")

    browser.press("ArrowRight")
    assert "(2 of 40 on this page)" in browser.run(WHERE)
    browser.run("document.getElementById('previous').click()")
    assert browser.run(WHERE).startswith("Window 0 of ")
    jump = "(to) => { const box = document.getElementById('jump'); box.value = to; box.dispatchEvent(new Event('change')); }"
    browser.run(f"({jump})(100000)")
    assert "(40 of 40 on this page)" in browser.run(WHERE)
    assert "not on this page" in browser.run("document.getElementById('pinned').textContent")
    assert browser.run("document.getElementById('next').disabled") is True

    browser.run(
        "[...document.querySelectorAll('#layout button')].find((b) => b.textContent === 'pad').click()"
    )
    select = "const box = document.getElementById('length'); box.value = 64; box.dispatchEvent(new Event('change'))"
    browser.run(f"{{{select}}}")
    browser.run(f"({jump})(39)")
    assert browser.run(WHERE).startswith("Window 39 of 40 (40 of 40 on this page): document 39, ")
    shown = browser.run("document.getElementById('text').textContent")
    assert "第38章 𠮷野家 line⏎\nnext ⟨202E⟩<|im_end|>" in shown
    cells = "[...document.querySelectorAll('#text .t')]"
    assert browser.run(f"{cells}.at(-1).classList.contains('padding')") is True
    assert browser.run(f"{cells}[0].className") == "t special unlearned"

    browser.run(f"({jump})(0)")
    assert HOSTILE in browser.run("document.getElementById('text').textContent")
    browser.run(f"{cells}[1].click()")
    assert browser.run("document.getElementById('pinned').textContent").startswith("position 1 · id ")

    for settings in ({"width": 400}, {"dark": True}, {}):
        browser.show(**settings)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth") is True
    assert browser.run("document.title") == "d: what is in it"
    asked = [event["params"]["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []


def test_every_window_of_a_page_can_be_drawn(browser, page):
    browser.open(page.as_uri())
    for layout in (0, 1):
        browser.run(f"document.querySelectorAll('#layout button')[{layout}].click()")
        browser.run("document.getElementById('jump').value = 0")
        browser.run("document.getElementById('jump').dispatchEvent(new Event('change'))")
        seen = set()
        while browser.run("document.getElementById('next').disabled") is False:
            seen.add(browser.run(WHERE))
            browser.run("document.getElementById('next').click()")
            assert browser.run("document.querySelectorAll('#text .t').length") > 0
        assert len(seen) == 39
    assert browser.seen("Runtime.exceptionThrown", "Log.entryAdded") == []
