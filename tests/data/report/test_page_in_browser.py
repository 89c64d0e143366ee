"""The page in a real browser: it draws, turns, asks nobody for anything and complains about nothing."""

import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.report.page import write_page
from minimind_data.report.statistics import stats
from minimind_data.tokenizer.loading import load_tokenizer
from tests.helpers.pages import BROWSER, Browser

HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror=\'document.title = "taken"\'>'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]


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
