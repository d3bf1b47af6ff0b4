"""The page in a real browser: against a server that invents its text, and against the real one."""

import json
import re
import time
import urllib.parse

import httpx
import pytest

from tests.serving.browser import CHROMIUM, Page, browse
from tests.serving.mock_server import END, MODELS, MockServer

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
PROMPT = "Once upon a time"
# The lowest contrast of any visible text with what is behind it, and that text.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const read = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
                          return [...canvas.getImageData(0, 0, 1, 1).data].map(x => x / 255); };
  const light = color => color.slice(0, 3).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    const color = read(getComputedStyle(element).backgroundColor);
    return color[3] > .99 || !element.parentElement ? color : behind(element.parentElement);
  };
  return [...document.querySelectorAll('body *')].filter(element => element.checkVisibility()
      && !element.matches('.masked b, mark, #mirror, :disabled, option, script')
      && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(element => {
    const [low, high] = [light(read(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => a - b);
    return [(high + .05) / (low + .05), element.textContent];
  }).sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browse(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def mock():
    mock = MockServer()
    with mock.running() as mock.url:
        yield mock


@pytest.fixture
def page(browser, mock) -> Page:
    """A freshly loaded page; fails afterwards if its console had errors or it asked another host for anything."""
    mock.reset()
    browser.requests.clear()
    open_page(browser, mock.url)
    browser.problems.clear()
    yield browser
    assert not browser.problems
    assert {urllib.parse.urlsplit(request["url"]).netloc for request in browser.requests
            if not request["url"].startswith(("data:", "blob:"))} == {urllib.parse.urlsplit(mock.url).netloc}


def open_page(page: Page, url: str, **options) -> None:
    page.open(url, **options)
    page.evaluate("sessionStorage.clear(), localStorage.clear()")
    page.wait("document.querySelector('#model').options.length > 0")


def choose(page: Page, model: str, **settings) -> None:
    def set_value(selector: str, value: str, event: str) -> None:
        page.evaluate(f"""(x => {{
            x.value = {json.dumps(value)};
            x.dispatchEvent(new Event('{event}', {{bubbles: true}}));
        }})(document.querySelector('{selector}'))""")

    set_value("#model", model, "change")
    for name, value in settings.items():
        set_value(f"#settings [name={name}]", str(value), "input")


def generate(page: Page, prompt: str = PROMPT) -> None:
    page.type("#prompt", prompt)
    page.press("Enter", ctrl=True)
    wait_for_end(page)


def wait_for_end(page: Page) -> None:
    page.wait("!document.querySelector('#generate').hidden")
    page.evaluate("new Promise(requestAnimationFrame)")


def shown(page: Page, panel: int = 0) -> str:
    """Returns the text on the page, a box for each masked token."""
    return page.evaluate(f"""[...document.querySelectorAll('.text')[{panel}].children]
        .filter(cell => cell.checkVisibility())
        .map(cell => cell.classList.contains('masked') ? '\u2591' : cell.textContent).join('')""")


def count(page: Page, selector: str) -> int:
    return page.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_generates_and_steps(page, mock):
    choose(page, "full", max_tokens=12, seed=3)
    generate(page)
    final = PROMPT + "".join(mock.words) * 2
    assert shown(page) == final
    assert mock.bodies == [{"model": "full", "policy": "confidence", "prompt": PROMPT, "max_tokens": 12, "seed": 3,
                              "stream": True, "stream_steps": True, "stream_options": {"include_usage": True}}]
    assert "12 tokens" in page.text(".facts") and "6 passes" in page.text(".facts") and "seed 3" in page.text(".facts")
    page.evaluate("document.activeElement.blur()")
    for key, masked in (("ArrowLeft", 2), ("ArrowLeft", 4), ("ArrowRight", 2), ("Home", 12), ("End", 0)):
        page.press(key)
        assert shown(page).count("\u2591") == masked
    assert page.text("#count") == "step 6 of 6"
    page.evaluate("document.querySelector('#speed').value = '0'")
    page.press(" ")
    page.wait("document.querySelector('#play').textContent === 'Play'")
    assert shown(page) == final


def test_order_and_confidence_color_tokens(page):
    choose(page, "full", max_tokens=12)
    generate(page)

    def parts():
        return [float(x) for x in page.evaluate(
            "[...document.querySelectorAll('.text .shown')].map(x => x.style.getPropertyValue('--part'))")]

    confidence = parts()
    page.click("button[data-view=order]")
    order = parts()
    assert all(0 <= part < 1 for part in confidence) and len(set(confidence)) == 12
    assert sorted(order) == pytest.approx(sorted([i / 5 for i in range(6)] * 2))
    assert count(page, ".map i") == 12


def test_settings_fit_policy_and_model(page, mock):
    def names():
        return page.evaluate("[...document.querySelectorAll('#settings [name]')].map(x => x.name)")

    choose(page, "full")
    assert {"num_steps", "block_length", "remask"} <= set(names()) and "threshold" not in names()
    choose(page, "full", policy="threshold", threshold=0.5, block_length=8, remask=0.1)
    choose(page, "full", policy="autoregressive")
    assert not {"num_steps", "block_length", "remask", "threshold"} & set(names())
    generate(page)
    assert not {"block_length", "remask", "threshold"} & mock.bodies[-1].keys()
    choose(page, "blocks")
    assert "threshold" in names() and "block_length" not in names()


def test_gaps(page, mock):
    choose(page, "full")
    page.type("#prompt", "A .")
    page.evaluate("document.querySelector('#prompt').setSelectionRange(1, 2)")
    page.click("#gap")
    page.call("Input.insertText", text="3")
    page.press("Enter", ctrl=True)
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"] == "A<mask:3>." and mock.bodies[-1]["infill"] is True
    assert "max_tokens" not in mock.bodies[-1]
    assert shown(page) == "A and then she."
    assert page.evaluate("document.querySelector('#mirror mark').textContent") == "<mask:3>"
    choose(page, "blocks")
    assert "blocks" in page.text("#note")


def test_edits_and_masks_are_rewritten(page, mock):
    choose(page, "full", max_tokens=6)
    generate(page)  # position 0 is the start of text, 1 to 4 the prompt
    page.click("[data-position='7'] b")
    page.type(".edit input", "he")
    page.press("Enter")
    assert "3 tokens" in page.text(".edit p")  # those after the edit
    page.click("[data-position='9'] b")
    page.press("ArrowRight", shift=True)
    page.press("Delete")
    assert shown(page) == PROMPT + " and then he saw\u2591\u2591"
    page.click("[data-position='5'] b")
    page.click("[data-position='6'] b", shift=True)
    page.click("[data-do=mask]")
    page.click("[data-do=rewrite]")
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"] == PROMPT + "<mask:2> he saw<mask:2>" and mock.bodies[-1]["infill"] is True
    assert shown(page) == PROMPT + " and then he saw she saw"
    assert count(page, "#history li") == 2


def test_edit_alone_rewrites_what_follows(page, mock):
    choose(page, "full", max_tokens=6)
    generate(page)
    page.click("[data-position='2'] b")
    page.type(".edit input", "under")
    page.press("Enter")
    page.click("[data-do=rewrite]")
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"] == "Once under a time" and mock.bodies[-1]["max_tokens"] == 6
    page.evaluate("go(1)")
    page.click("[data-do=rewrite]")  # the masked tokens of a step
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"].count("<mask:") >= 1


def test_half_of_a_character_is_not_sent(page, mock):
    mock.words = [" a", "\ufffd", " b", " c"]
    choose(page, "full", max_tokens=4)
    generate(page)
    page.click("[data-position='8'] b")
    page.click("[data-do=mask]")
    page.click("[data-do=rewrite]")
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"] == PROMPT + " a<mask:1> b<mask:1>"


@pytest.mark.parametrize("model", ["blocks", "parent"])
def test_models_blind_to_text_after_gaps_rewrite_all_after_edit(page, mock, model):
    choose(page, model, max_tokens=6)
    generate(page)
    page.click("[data-position='7'] b")
    page.click("[data-do=mask]")
    assert "everything after" in page.text(".edit p")
    page.click("[data-do=rewrite]")
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"] == PROMPT + " and then" and mock.bodies[-1]["max_tokens"] == 4
    assert "infill" not in mock.bodies[-1]


def test_beside_parent(page, mock):
    choose(page, "blocks", max_tokens=6, seed=1)
    page.click("#compare")
    generate(page)
    assert {body["model"] for body in mock.bodies} == {"blocks", "parent"}
    assert all(body["prompt"] == PROMPT and body["max_tokens"] == 6 for body in mock.bodies)
    assert shown(page, 0) == shown(page, 1) == PROMPT + "".join(mock.words)
    assert count(page, ".facts") == 2 and page.evaluate(
        "[...document.querySelectorAll('.facts')].every(x => x.textContent.includes('tokens per pass'))")
    page.evaluate("document.activeElement.blur()")
    page.press("Home")
    assert shown(page, 0) == shown(page, 1) == PROMPT + "\u2591" * 6
    page.type("#prompt", "A <mask:2> gap")
    assert page.evaluate("document.querySelector('#beside').hidden")


def test_stop(page, mock):
    mock.pause.clear()
    page.type("#prompt", PROMPT)
    page.press("Enter", ctrl=True)
    page.wait("document.querySelectorAll('.text .masked').length > 0")
    page.press("Escape")
    wait_for_end(page)
    assert page.text("#status") == "Stopped."
    assert mock.left.wait(5)


def test_errors_are_shown_in_place(page, mock):
    choose(page, "full", max_tokens=6)
    generate(page)
    before = shown(page)
    choose(page, "full", temperature=-1)
    generate(page)
    assert page.text("#error") == "temperature is -1" and shown(page) == before
    page.wait("true")
    page.problems.clear()  # the browser logs every answer of 400
    choose(page, "full", temperature="")
    mock.failure = "the time limit is over"
    generate(page)
    assert page.text("#error") == mock.failure and "\u2591" in shown(page)
    mock.failure = ""
    generate(page)
    assert page.text("#error") == ""


def test_key_is_asked_for(browser, mock):
    mock.reset()
    mock.key = "secret"
    browser.open(mock.url)
    browser.wait("!document.querySelector('#login').hidden")
    browser.type("#key", "secret")
    browser.press("Enter")
    browser.wait("document.querySelector('#model').options.length > 0")
    assert browser.evaluate("document.querySelector('#login').hidden")
    assert browser.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    browser.evaluate("sessionStorage.clear()")


def test_markup_in_text_is_text(page, mock):
    mock.words = ["<img src=x onerror=alert(1)>", " <script>alert(2)</script>", "</span>"]
    choose(page, "full", max_tokens=3)
    generate(page, "<b onclick=alert(3)>")
    assert shown(page) == "<b onclick=alert(3)>" + "".join(mock.words)
    page.click(".text .shown b")
    page.click("button[data-view=order]")
    assert count(page, "main img, main script, #past script") == 0
    page.type("#prompt", "<i><mask:3></i>")
    assert count(page, "i:not(.map i)") == 0


def test_text_ends_at_end_of_text(page, mock):
    mock.words = [" one", END, END, END]
    choose(page, "full", max_tokens=4)
    generate(page)
    assert shown(page) == PROMPT + " oneend"
    page.click("[data-position='4'] b")
    page.type(".edit input", "day")
    page.press("Enter")
    page.click("[data-do=rewrite]")
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"] == "Once upon a day" and mock.bodies[-1]["max_tokens"] == 4


def test_conversation(page, mock):
    choose(page, "chat", max_tokens=6)
    page.click("[data-mode=chat]")
    generate(page, "Hello")
    answer = "".join(mock.words)
    generate(page, "More")
    assert [message["content"] for message in mock.bodies[-1]["messages"]] == ["Hello", answer, "More"]
    page.evaluate("go(Infinity)")
    last = page.evaluate("document.querySelectorAll('.text span').length") - 1
    page.click(f"[data-position='{last}'] b")
    page.click("[data-do=mask]")
    page.click("[data-do=rewrite]")
    wait_for_end(page)
    assert mock.bodies[-1]["prompt"].startswith("<|user|>Hello<|assistant|>") and mock.bodies[-1]["max_tokens"] == 1


def test_history_copy_and_steps_file(page, mock, tmp_path):
    choose(page, "full", max_tokens=6)
    generate(page, "First")
    generate(page, "Second")
    page.click("#history li:last-child button")
    assert shown(page).startswith("First")
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click("[data-do=copy]")
    page.wait("document.querySelector('[data-do=copy]').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == shown(page)
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("[data-do=download]")
    end = time.monotonic() + 10
    while not (files := list(tmp_path.glob("*.json"))):
        assert time.monotonic() < end
        time.sleep(0.05)
    saved = json.loads(files[0].read_text())
    assert saved["request"]["prompt"] == "First" and len(saved["steps"]) == 3 and saved["usage"]["forward_passes"] == 3
    page.click("[data-do=reuse]")
    assert page.evaluate("document.querySelector('#prompt').value") == "First"
    assert page.evaluate("document.querySelector('[name=seed]').value") == "7"


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_and_legible(browser, mock, dark):
    mock.reset()
    open_page(browser, mock.url, width=360, height=780, dark=dark)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(250, 249, 246)")

    def check():
        assert browser.evaluate("document.documentElement.scrollWidth") == 360
        assert browser.evaluate(CONTRAST)[0] >= 4.5, browser.evaluate(CONTRAST)

    browser.evaluate("document.querySelector('details').open = true")
    check()
    choose(browser, "blocks", max_tokens=64)
    browser.click("#compare")
    generate(browser, "A_very_long_word_" * 8)
    check()
    browser.click(".text span:nth-child(9) b")
    check()
    browser.type(".edit input", "a long replacement of it")
    browser.press("Enter")
    browser.click("button[data-view=order]")
    check()
    browser.click("#theme")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != (
        "rgb(20, 23, 27)" if dark else "rgb(250, 249, 246)")
    check()
    browser.click("#help")
    check()


def test_names_what_it_has(page):
    """Every control has a name for screen readers."""
    choose(page, "full", max_tokens=4)
    generate(page)
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in (
        "button", "textbox", "combobox", "checkbox", "slider", "spinbutton", "listbox")]
    page.call("Accessibility.disable")
    assert len(controls) > 15 and all(node["name"]["value"] for node in controls)
    assert len(MODELS) == count(page, "#model option")


@pytest.mark.parametrize("model", ["full", "blocks"])
def test_same_text_as_api(browser, server, model):
    """The real server; its model writes random bytes, so some characters are of several tokens, or broken."""
    prompt, settings = "Zoë 你好", {"max_tokens": 16, "seed": 3}
    open_page(browser, server)
    browser.problems.clear()
    choose(browser, model, **settings)
    generate(browser, prompt)
    done = httpx.post(f"{server}/v1/completions", json={"model": model, "prompt": prompt, **settings}).json()
    choice, usage = done["choices"][0], done["usage"]
    expected = prompt + choice["text"] + "end" * (choice["finish_reason"] == "stop")
    assert same_but_broken(shown(browser)) == same_but_broken(expected)
    assert f"{usage['completion_tokens']} tokens" in browser.text(".facts")
    assert f"{usage['forward_passes']} passes" in browser.text(".facts")
    browser.click("[data-position='1'] b")
    browser.type(".edit input", "Zoo")
    browser.press("Enter")
    browser.click("[data-position='6'] b")  # the model that sees text after gaps fills this one alone
    browser.click("[data-do=mask]")
    browser.click("[data-do=rewrite]")
    wait_for_end(browser)
    assert browser.text("#error") == "" and shown(browser).startswith("Zoo")
    assert not browser.problems


def same_but_broken(text: str) -> str:
    """Returns a text with one sign for a broken character, of however many bytes."""
    return re.sub("\ufffd+", "\ufffd", text)
