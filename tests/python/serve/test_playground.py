"""The page in a real browser: it streams, stops, shows alternatives, fits 360 px, and remembers.

    pip install playwright; apt install chromium; npm install --no-save axe-core
    pytest -m clients tests/python/serve

Pictures are kept in build/screenshots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from others import Others, Started

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.merged import AdapterSet
from small_models import make_adapter, make_checkpoint, make_config

ROOT = Path(__file__).resolve().parents[3]
STATIC = ROOT / "python" / "gptc" / "serve" / "static"
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
PICTURES = ROOT / "build" / "screenshots"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
clients = pytest.mark.clients


def test_pages_load_nothing_from_elsewhere() -> None:
    files = sorted(STATIC.iterdir())
    assert {"index.html", "playground.js", "playground.css"} <= {file.name for file in files}
    for file in files:
        text = file.read_text("utf-8")
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), file.name
        if file.suffix == ".html":
            assert not re.search(r"<script>|<style>| on[a-z]+=| style=", text), file.name


@pytest.fixture(scope="module")
def launched() -> Iterator[dict[str, Any]]:
    """The browser of this file, once one was started: headless, with an empty folder of data."""
    kept: dict[str, Any] = {}
    yield kept
    if kept:
        kept["browser"].close()
        kept["play"].stop()


@pytest.fixture
def browser(launched: dict[str, Any], other: Others) -> Any:
    api = other.package("playwright", "playwright.sync_api")
    program = other.program("chromium", "chromium-browser", install="apt install chromium")
    if not launched:
        launched["play"] = api.sync_playwright().start()
        launched["browser"] = launched["play"].chromium.launch(executable_path=program, args=FLAGS)
    return launched["browser"]


@pytest.fixture
def page(browser: Any, started: Started, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(browser, started.url, request.node.name) as page:
        yield page


@contextmanager
def opened(browser: Any, url: str, name: str, **options: Any) -> Iterator[Any]:
    """The page, which has no error and asks no other server; its end is a picture."""
    context = browser.new_context(**{"viewport": {"width": 360, "height": 740}, **options})
    page = context.new_page()
    problems: list[str] = []
    page.on("request", lambda r: None if r.url.startswith(url) else problems.append(r.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.set_default_timeout(60_000)
    page.goto(url)
    page.wait_for_selector("body[data-ready=yes]")
    yield page
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
    assert problems == []
    context.close()


@pytest.fixture
def axe(other: Others) -> str:
    """The program of axe-core, which finds what keeps people from using a page."""
    return other.file(AXE, "axe-core", install="npm install --no-save axe-core")


def barriers(page: Any, axe: str) -> list[str]:
    """The findings of axe-core, serious or not: the rule, and the elements."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{one['id']} ({one['help']}): {', '.join(node['html'][:200] for node in one['nodes'])}"
        for one in found
    ]


def says(page: Any, text: str) -> None:
    page.locator("#status", has_text=text).wait_for()


def wide(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))


@clients
def test_a_completion_with_alternatives_by_keyboard(page: Any) -> None:
    assert wide(page) <= 360
    assert page.locator("#models").is_hidden()  # there is one model
    page.fill("#option-max_tokens", "12")
    page.fill("#option-n", "2")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    says(page, "24 tokens")
    assert page.locator(".sample").count() == 2
    assert page.locator(".sample").first.locator(".token").count() == 12
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#alternatives button").count() >= 5
    enabled = page.locator("#alternatives button:enabled")
    if enabled.count():
        enabled.first.click()
        assert page.input_value("#prompt").startswith("Once upon a time")
        page.wait_for_selector("#stop:disabled")
    assert wide(page) <= 360


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.className"))


def tab_to(page: Any, name: str) -> None:
    """Presses Tab until an element has the focus; everything is reached so."""
    for _ in range(60):
        if focused(page) == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {name}")


@clients
def test_the_keyboard_is_enough(page: Any) -> None:
    """No pointer: the theme, a mode, the text, an option, a run, an alternative, and stopping."""
    tab_to(page, "theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    tab_to(page, "prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("the king")
    tab_to(page, "option-max_tokens")
    page.keyboard.press("Control+a")
    page.keyboard.type("6")
    page.keyboard.press("Control+Enter")
    says(page, "6 tokens")
    page.keyboard.press("Shift+Tab")
    for _ in range(10):
        if focused(page) != "token":
            page.keyboard.press("Shift+Tab")
    assert focused(page) == "token"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('prompt').value.length > 9")
    assert page.input_value("#prompt").startswith("the king")
    says(page, "6 tokens")
    tab_to(page, "option-max_tokens")
    page.keyboard.press("Control+a")
    page.keyboard.type("1900")
    page.keyboard.press("Control+Enter")
    page.locator(".token").nth(3).wait_for()
    page.keyboard.press("Escape")
    says(page, "stopped")


@clients
def test_alternatives_on_hover_and_by_click(page: Any) -> None:
    page.fill("#option-max_tokens", "6")
    page.fill("#option-seed", "1")
    page.click("#run")
    says(page, "6 tokens")
    shades = page.locator(".token").evaluate_all("all => all.map((t) => t.style.backgroundColor)")
    assert len(set(shades)) > 1
    page.locator(".token").nth(2).hover()
    page.locator("#alternatives button").first.wait_for()
    first = page.locator("#alternatives h2").text_content()
    page.locator(".token").nth(4).click()
    assert page.locator("#alternatives h2").text_content() != first
    page.locator("#alternatives button:enabled").first.click()
    page.wait_for_function("document.getElementById('prompt').value.length > 16")
    says(page, "6 tokens")


@clients
def test_a_token_that_is_not_drawn_has_a_mark(page: Any) -> None:
    """A pointer finds it, and the text stays as it is."""
    texts = ["a", "\n", "\t", "\u0001", "\n\n"]
    chances = {"token_logprobs": [-1.0] * 5, "top_logprobs": [{text: -1.0} for text in texts]}
    choice = {"index": 0, "text": "".join(texts), "logprobs": {"tokens": texts, **chances}}
    answer = {"choices": [choice], "usage": {"completion_tokens": 5}}
    body = f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=body))
    page.click("#run")
    says(page, "5 tokens")
    tokens = page.locator(".token")
    marks = tokens.evaluate_all("all => all.map((t) => t.dataset.mark ?? '')")
    assert marks == ["", "\u21b5", "", "\u00b7", "\u21b5"]
    for i, text in enumerate(texts):
        tokens.nth(i).hover()
        said = page.locator("#alternatives h2").text_content()
        assert said == f"Instead of {json.dumps(text)}"
    assert "".join(tokens.all_text_contents()) == "".join(texts)


@clients
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_follows_the_system(browser: Any, started: Started, scheme: str) -> None:
    for width in (360, 1280):
        size = {"width": width, "height": 740}
        name = f"{scheme}_{width}"
        with opened(browser, started.url, name, color_scheme=scheme, viewport=size) as page:
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back))) < 200) == (scheme == "dark")
            assert wide(page) <= width
            outside = page.locator("button, input, textarea, a").evaluate_all(
                "all => all.filter((e) => e.getBoundingClientRect().right > innerWidth)"
                ".map((e) => e.outerHTML)"
            )
            assert outside == []


# A fast machine writes all tokens before a key of the test reaches the page.
ESCAPE_AT_THE_FIRST_TOKEN = """
new MutationObserver((_, observer) => {
    if (!document.querySelector(".token")) return;
    observer.disconnect();
    const escape = new KeyboardEvent("keydown", { key: "Escape", bubbles: true });
    document.activeElement.dispatchEvent(escape);
}).observe(document.body, { childList: true, subtree: true })
"""


@clients
def test_stop_session_and_theme(page: Any) -> None:
    page.fill("#option-max_tokens", "2000")
    page.evaluate(ESCAPE_AT_THE_FIRST_TOKEN)
    page.click("#run")
    says(page, "stopped")
    n_shown = page.locator(".token").count()
    page.wait_for_timeout(300)
    assert page.locator(".token").count() == n_shown
    page.click("#theme")
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.fill("#option-max_tokens", "7")
    page.fill("#prompt", "remember this")
    tokens = page.locator(".token").all_text_contents()
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.locator(".token").all_text_contents() == tokens
    assert page.input_value("#prompt") == "remember this"
    assert page.input_value("#option-max_tokens") == "7"
    assert page.evaluate("document.documentElement.dataset.theme") == theme


@clients
def test_a_conversation(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.post_data or ""))
    assert page.locator("#system").is_hidden()
    page.check("input[value=chat]")
    page.fill("#system", "Be brief.")
    page.fill("#option-max_tokens", "5")
    page.fill("#prompt", "Hello")
    page.click("#run")
    says(page, "5 tokens")
    sent = json.loads(asked[-1])["messages"]
    assert [(one["role"], one["content"]) for one in sent] == [
        ("system", "Be brief."),
        ("user", "Hello"),
    ]
    assert page.locator("#messages li").count() == 2
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.input_value("#system") == "Be brief."


@clients
def test_an_answer_continues_from_an_alternative(page: Any) -> None:
    """Its beginning stays, and takes the place of the answer in the conversation."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.post_data or ""))
    page.check("input[value=chat]")
    page.fill("#option-max_tokens", "6")
    page.fill("#option-logit_bias", '{"65": 100}')
    page.fill("#prompt", "Hello")
    page.click("#run")
    says(page, "6 tokens")
    page.locator(".token").nth(2).hover()
    button = page.locator("#alternatives button:enabled").first
    begun = "AA" + json.loads(button.text_content().rpartition('"')[0] + '"')
    button.click()
    says(page, "6 tokens")
    sent = json.loads(asked[-1])
    assert sent["continue_final_message"] is True
    assert sent["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": begun},
    ]
    assert page.locator("#messages li").all_text_contents() == [
        "user: Hello",
        f"assistant: {begun}AAAAAA",
    ]


@clients
def test_a_message_without_an_answer_is_a_prompt_after_a_reload(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # which never answers
    page.check("input[value=chat]")
    page.fill("#prompt", "Hello")
    page.click("#run")
    page.wait_for_selector("#messages li")
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.input_value("#prompt") == "Hello"
    assert page.locator("#messages li").count() == 0


@clients
def test_a_bias(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.post_data or ""))
    page.fill("#option-max_tokens", "3")
    page.fill("#option-logit_bias", "5: 100")
    page.click("#run")
    says(page, "logit_bias is not JSON")
    assert asked == []
    page.fill("#option-logit_bias", '{"5": 100}')
    page.click("#run")
    says(page, "3 tokens")
    assert json.loads(asked[-1])["logit_bias"] == {"5": 100}


@clients
def test_an_adapter_is_chosen(browser: Any, own_server: Any, tmp_path: Path) -> None:
    """The name of an adapter goes with the request; the page remembers it."""
    base = make_checkpoint(make_config("llama"), folder=tmp_path / "base").path
    one = make_adapter(tmp_path / "one", base, "all", 2)

    def adapters() -> AdapterSet:
        return AdapterSet(open_checkpoint(base), [one], [None])

    model = load_model(open_checkpoint(base), lora=adapters().lora, dtype="fp32", threads=1)
    with (
        own_server(model=model, adapters=adapters) as server,
        opened(browser, server.url, "an_adapter") as page,
    ):
        assert page.locator("#name option").all_text_contents() == ["tiny", "one"]
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.post_data or ""))
        page.select_option("#name", "one")
        page.fill("#option-max_tokens", "3")
        page.click("#run")
        says(page, "3 tokens")
        assert [json.loads(body)["model"] for body in asked] == ["one"]
        page.reload()
        page.wait_for_selector("body[data-ready=yes]")
        assert page.input_value("#name") == "one"
        assert wide(page) <= 360


@clients
def test_a_message_without_an_answer_can_be_sent_again(page: Any) -> None:
    page.check("input[value=chat]")
    page.fill("#option-max_tokens", "5")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=""))
    page.fill("#prompt", "Hello")
    page.click("#run")
    says(page, "the answer was cut off")
    assert page.input_value("#prompt") == "Hello"
    page.unroute("**/v1/chat/completions")
    page.click("#run")
    says(page, "5 tokens")
    assert page.locator("#messages li").count() == 2


@clients
def test_the_documentation(page: Any, started: Started) -> None:
    page.goto(f"{started.url}/docs")
    page.wait_for_selector("table")
    assert page.locator("h2").count() >= 9
    assert page.get_by_text("min_p").count() >= 1


@clients
def test_nothing_keeps_people_from_using_it(page: Any, started: Started, axe: str) -> None:
    """No finding of axe-core: with texts and alternatives, in both themes, and in /docs."""
    page.fill("#option-max_tokens", "12")
    page.fill("#option-n", "2")
    page.fill("#option-seed", "1")
    page.click("#run")
    says(page, "24 tokens")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.locator("#alternatives button").first.wait_for()
    for _ in range(2):
        assert barriers(page, axe) == []
        page.click("#theme")
    page.check("input[value=chat]")
    page.fill("#prompt", "Hello")
    page.click("#run")
    says(page, "tokens")
    page.locator("#messages li").nth(1).wait_for()
    assert barriers(page, axe) == []
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=""))
    page.fill("#prompt", "Hello")
    page.click("#run")
    page.locator("#status.error").wait_for()
    for _ in range(2):
        assert barriers(page, axe) == []
        page.click("#theme")
    page.goto(f"{started.url}/docs")
    page.wait_for_selector("table")
    assert barriers(page, axe) == []


@clients
def test_a_barrier_is_found(page: Any, axe: str) -> None:
    page.evaluate("document.body.append(document.createElement('button'))")
    assert any(found.startswith("button-name") for found in barriers(page, axe))
