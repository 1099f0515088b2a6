"""The page at `/`, as it is sent, and in a browser."""

import contextlib
import json
import re
import shutil
import subprocess
import time

import pytest

from cometlm.serve import answer, page
from cometlm.serve.keys import Keys, new_key
from tests.serve.running import running, service_of
from tests.sessions import TEXT

# --- how it is sent -----------------------------------------------------------------------------


def test_every_file_of_the_page_is_given(server):
    for path in page.PATHS:
        sent = server.http.get(path)
        assert sent.status_code == 200
        policy = sent.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert sent.headers["x-content-type-options"] == "nosniff"
        again = server.http.get(path, headers={"If-None-Match": sent.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert server.http.head(path).headers["etag"] == sent.headers["etag"]
    assert server.http.get("/page/app.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("path", ["/page/__init__.py", "/page/../app.py", "/page/", "/page"])
def test_nothing_else_is_given(server, path):
    assert server.http.get(path).status_code == 404


def test_it_asks_for_nothing_from_elsewhere(server):
    for path in page.PATHS:
        for line in server.http.get(path).text.splitlines():
            assert "//" not in line.split("// ")[0].replace("http://www.w3.org/2000/svg", "")


def test_it_needs_no_key_and_what_it_asks_for_does(tmp_path):
    new_key(tmp_path / "keys", "ann")
    with running(keys=Keys.read(tmp_path / "keys")) as server:
        assert all(server.http.get(path).status_code == 200 for path in page.PATHS)
        assert server.http.post("/").status_code in (401, 405)
        assert server.http.get("/v1/sessions").status_code == 401


def test_it_can_be_left_out(tmp_path):
    with running(with_page=False) as server:
        assert {server.http.get(path).status_code for path in page.PATHS} == {404}
    new_key(tmp_path / "keys", "ann")
    with running(with_page=False, keys=Keys.read(tmp_path / "keys")) as server:
        assert server.http.get("/").status_code == 401


# --- in a browser -------------------------------------------------------------------------------

DONE = 60_000  # milliseconds that a tiny model may take on a busy machine


class Visit:
    """A page that is looked at, and what it complains about."""

    def __init__(self, page):
        self.page, self.errors = page, []
        page.set_default_timeout(DONE)
        page.on("pageerror", lambda error: self.errors.append(error))
        page.on("console", self._note)

    def _note(self, message):
        # A status that is no good is said by the browser, too; the page shows it to its user.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def button(self, name, nth=0):
        return self.page.get_by_role("button", name=name, exact=True).nth(nth)

    def tool(self, name, session):
        """What the list can do with a session."""
        called = self.page.locator(f"summary[aria-label='More: {session}']")
        self.use(name, self.page.locator("#sessions li", has=called).first)

    def use(self, name, row):
        if row.locator("details").get_attribute("open") is None:
            row.locator("summary").click()
        row.locator(".tools button", has_text=name).click()

    def say(self, text):
        """Say something; the id of the answer."""
        before = self.head
        self.page.fill("#box", text)
        self.page.press("#box", "Enter")
        self.page.wait_for_function("before => location.hash.slice(1) !== before", arg=before)
        return self.head

    def give(self, *files, wait=True):
        made = [
            {"name": name, "mimeType": "text/plain", "buffer": text.encode()}
            for name, text in files
        ]
        self.page.set_input_files("#file", made)
        if wait:
            self.page.wait_for_function("() => location.hash.startsWith('#file-')")

    @property
    def head(self):
        return self.page.evaluate("location.hash.slice(1)")

    @property
    def box(self):
        return self.page.input_value("#box")

    def said(self, kind):
        return self.page.locator(f".{kind} .text").all_text_contents()

    def see(self, words):
        self.page.get_by_text(words).first.wait_for()


@contextlib.contextmanager
def visiting(chromium, server, most=12, **options):
    context = chromium.new_context(**options)
    kept = json.dumps({"temperature": 0, "most": most, "instructions": ""})
    context.add_init_script(f"localStorage.setItem('cometlm:options', {kept!r})")
    visit = Visit(context.new_page())
    visit.page.goto(server.url)
    visit.page.wait_for_function("() => document.title.startsWith('tiny')")
    try:
        yield visit
    finally:
        context.close()
    assert visit.errors == []


@pytest.fixture
def visit(chromium, server):
    with visiting(chromium, server) as one:
        yield one


@pytest.mark.slow
def test_a_conversation(visit, server):
    """Answers are those of the server; what was said is text, whatever it looks like."""
    first = visit.say("Who tells the story?")
    evil = "<img src=x onerror=alert(1)> </p><script>alert(2)</script> & more"
    second = visit.say(evil)
    want = [server.openai.responses.retrieve(name) for name in (first, second)]
    assert want[1].previous_response_id == first
    assert visit.said("asked") == ["Who tells the story?", evil]
    assert visit.said("answered") == [one.output_text for one in want]
    assert visit.page.locator("#log img, #log script").count() == 0
    about = server.http.get(f"/v1/sessions/{second}").json()
    visit.page.wait_for_function(
        "want => document.getElementById('tokens').textContent === want",
        arg=f"{about['tokens']:,} tokens",
    )
    assert visit.page.inner_text("#bytes").endswith("KiB")
    assert visit.box == ""


@pytest.mark.slow
def test_a_reload_shows_it_again_and_goes_on(visit, server):
    first = visit.say("Who tells the story?")
    shown = visit.said("answered")
    visit.page.fill("#box", "not sent yet")
    visit.page.reload()
    visit.see("Who tells the story?")
    assert visit.said("answered") == shown
    assert visit.box == "not sent yet"
    assert server.openai.responses.retrieve(visit.say("Why?")).previous_response_id == first
    visit.page.go_back()
    visit.page.wait_for_function("() => document.querySelectorAll('article').length === 1")


@pytest.mark.slow
def test_another_browser_learns_it_from_the_server(chromium, visit, server):
    visit.give(("log.txt", TEXT[:200]))
    last = visit.say("Who tells the story?")
    with visiting(chromium, server) as other:
        other.page.goto(f"{server.url}/#{last}")
        other.page.locator("#log", has_text="Who tells the story?").wait_for()
        assert other.page.locator(".file strong").all_text_contents() == ["log.txt"]
        assert other.said("asked") == ["Who tells the story?"]
        assert other.said("answered") == visit.said("answered")


@pytest.mark.slow
def test_a_conversation_of_another_client(visit, server):
    """Its turns are found by what the server says of them; it is no turn itself."""
    made = server.openai.conversations.create()
    asked = {"model": "tiny", "max_output_tokens": 5, "conversation": made.id}
    for text in ("Who tells the story?", "Why so?"):
        last = server.openai.responses.create(input=text, **asked)
    visit.page.goto(f"{server.url}/#{last.id}")
    visit.page.locator("#log", has_text="Why so?").wait_for()
    assert visit.said("asked") == ["Who tells the story?", "Why so?"]
    assert visit.page.locator(f"#sessions a[href='#{made.id}']").count() == 0


@pytest.mark.slow
def test_calls_of_tools_are_shown(visit, server):
    made = server.openai.responses.create(model="tiny", input="Hi", max_output_tokens=3)
    call = {"type": "function_call", "name": "weather", "arguments": '{"in": "Bonn"}'}
    came = {"type": "function_call_output", "output": "Rain."}
    visit.page.route("**/input_items*", lambda route: route.fulfill(json={"data": [call, came]}))
    visit.page.goto(f"{server.url}/#{made.id}")
    visit.page.locator("#log", has_text="Rain.").wait_for()
    assert visit.said("asked") == ['weather({"in": "Bonn"})\n\nRain.']


@pytest.mark.slow
def test_branches(visit, server):
    first = visit.say("Who tells the story?")
    second = visit.say("Why?")
    visit.button("Branch from here").click()
    visit.see("What you say next begins another branch")
    assert visit.head == first
    assert visit.page.locator(".branches a").all_text_contents() == ["Why?"]
    third = visit.say("Where?")
    for name in (second, third):
        assert server.openai.responses.retrieve(name).previous_response_id == first
    visit.see("Branch 2 of 2")
    visit.button("The branch before").click()
    visit.page.wait_for_function("want => location.hash.slice(1) === want", arg=second)
    assert visit.said("asked") == ["Who tells the story?", "Why?"]
    visit.button("Ask otherwise", 1).click()
    assert (visit.head, visit.box) == (first, "Why?")
    listed = visit.page.locator("#sessions li a span:nth-of-type(1)").all_text_contents()
    assert {"Where?", "Why?"} <= set(listed)  # beside those of other tests


@pytest.mark.slow
def test_deleting_a_branch_leaves_the_other(visit, server):
    first = visit.say("Who tells the story?")
    second = visit.say("Why?")
    visit.button("Branch from here").click()
    third = visit.say("Whither?")
    visit.page.on("dialog", lambda dialog: dialog.accept())
    visit.tool("Delete", "Whither?")
    visit.page.wait_for_function("want => location.hash.slice(1) === want", arg=first)
    status = [server.http.get(f"/v1/sessions/{name}").status_code for name in (first, second)]
    assert status == [200, 200]
    assert server.http.get(f"/v1/sessions/{third}").status_code == 404


@pytest.mark.slow
def test_a_file_is_read_and_watched(chromium, monkeypatch):
    monkeypatch.setattr(answer, "_SAY_EVERY", 0.0)
    with running() as server, visiting(chromium, server) as visit:
        visit.page.evaluate("""() => {
            Object.assign(window, {seen: [], values: [], announced: []});
            const look = () => {
                seen.push(document.querySelector('.file span')?.textContent);
                announced.push(document.getElementById('said').textContent);
                const bar = document.querySelector('progress');
                if (bar?.hasAttribute('value')) values.push(bar.value);
            };
            new MutationObserver(look).observe(
                document.body, {subtree: true, childList: true, characterData: true});
        }""")
        visit.give(("log.txt", TEXT * 5))
        seen = visit.page.evaluate("[...new Set(seen)].filter((one) => /tokens read/.test(one))")
        assert len(seen) > 3
        shares = [int(re.fullmatch(r"(\d+)% of .*, .* tokens? read.*", one)[1]) for one in seen]
        assert shares == sorted(shares)
        assert shares[0] < 25 < 75 < shares[-1] <= 100
        values = visit.page.evaluate("values")
        assert len(set(values)) > 3
        assert values == sorted(values)
        assert "50% of log.txt read" in " ".join(visit.page.evaluate("announced"))
        file = server.http.get(f"/v1/files/{visit.head}").json()
        visit.see(f"{file['tokens']:,} tokens in all")
        asked = visit.say("Who wrote?")
        assert server.openai.responses.retrieve(asked).previous_response_id == file["id"]
        visit.give(("one.txt", "One. " * 30), ("two.txt", "Two. " * 30))
        visit.see("two.txt")
        assert visit.page.locator(".file strong").all_text_contents()[:2] == ["log.txt", "one.txt"]


@pytest.mark.slow
def test_a_copy_stays_when_its_original_goes(visit, server):
    """It stands beside the original, with the same words; each is gone on from by itself."""
    first = visit.say("Who is the cook?")
    second = visit.say("Since when?")
    said = visit.said("answered")
    visit.tool("Copy", "Since when?")
    visit.page.wait_for_function("() => location.hash.startsWith('#sess_')")
    copied = visit.head
    visit.see("Branch 2 of 2")
    assert visit.said("answered") == said
    assert visit.page.locator(f"#sessions a[href='#{second}']").count() == 1
    assert server.http.get(f"/v1/sessions/{copied}").json()["parent"] == second
    visit.page.goto(f"{server.url}/#{second}")
    visit.see("Branch 1 of 2")
    visit.page.on("dialog", lambda dialog: dialog.accept())
    link = visit.page.locator(f"a[href='#{second}']")
    visit.use("Delete", visit.page.locator("#sessions li", has=link))
    visit.page.wait_for_function("want => location.hash.slice(1) === want", arg=first)
    # Its row goes with the list's next answer.
    visit.page.wait_for_function("() => document.activeElement.id === 'new'")
    visit.page.goto(f"{server.url}/#{copied}")
    visit.page.locator("#log", has_text="Since when?").wait_for()
    more = server.openai.responses.retrieve(visit.say("Why?"))
    assert more.previous_response_id == copied


@pytest.mark.slow
def test_another_browser_learns_a_copy_from_the_server(chromium, visit, server):
    visit.say("Who is the smith?")
    visit.tool("Copy", "Who is the smith?")
    visit.page.wait_for_function("() => location.hash.startsWith('#sess_')")
    with visiting(chromium, server) as other:
        other.page.goto(f"{server.url}/#{visit.head}")
        other.page.locator("#log", has_text="Who is the smith?").wait_for()
        assert other.said("answered") == visit.said("answered")


@pytest.mark.slow
def test_a_session_is_taken_home_and_opened_again(visit, server, tmp_path):
    name = visit.say("Who is the miller?")
    with visit.page.expect_download() as waiting:
        visit.tool("Download", "Who is the miller?")
    file = tmp_path / waiting.value.suggested_filename
    assert file.name == f"{name}.safetensors"
    waiting.value.save_as(file)
    assert file.read_bytes() == server.http.get(f"/v1/sessions/{name}/content").content
    visit.page.set_input_files("#session-file", file)
    visit.page.wait_for_function("() => location.hash.startsWith('#sess_')")
    visit.see(f"{file.name} (Said by another program")
    about = [server.http.get(f"/v1/sessions/{one}").json() for one in (name, visit.head)]
    assert about[0]["tokens"] == about[1]["tokens"]
    brought = visit.head
    more = server.openai.responses.retrieve(visit.say("Why?"))
    assert more.previous_response_id == brought


@pytest.mark.slow
def test_a_session_file_that_is_dropped(visit, server):
    name = visit.say("Who is the baker?")
    content = server.http.get(f"/v1/sessions/{name}/content").content
    drop = """([bytes, name]) => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([new Uint8Array(bytes)], name));
        document.dispatchEvent(new DragEvent('drop', {dataTransfer, cancelable: true}));
    }"""
    visit.page.evaluate(drop, [list(content), "mine.safetensors"])
    visit.page.wait_for_function("() => location.hash.startsWith('#sess_')")
    opened = visit.head
    visit.page.evaluate(drop, [[1, 2, 3], "broken.safetensors"])
    visit.page.locator("#trouble", has_text="no session file").wait_for()
    assert visit.head == opened
    assert visit.page.locator("#bring").is_enabled()


@pytest.mark.slow
def test_a_file_that_is_dropped(visit):
    visit.page.evaluate("""() => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(['Calm sea. '.repeat(40)], 'sea.txt'));
        for (const kind of ['dragover', 'drop'])
            document.dispatchEvent(new DragEvent(kind, {dataTransfer, cancelable: true}));
    }""")
    visit.page.wait_for_function("() => location.hash.startsWith('#file-')")
    visit.see("sea.txt")
    assert visit.page.locator("#drop").is_hidden()


@pytest.mark.slow
def test_stopping(chromium, server):
    """The server stops, too; what was typed is in the box again."""
    with visiting(chromium, server, most=20_000) as visit:
        visit.page.fill("#box", "Go on and on")
        visit.page.press("#box", "Enter")
        visit.page.wait_for_function("() => document.querySelector('.answered .text').innerText")
        visit.page.keyboard.press("Escape")
        visit.see("Stopped. This is not part of the conversation.")
        assert (visit.box, visit.head) == ("Go on and on", "")
        until = time.monotonic() + 60
        while server.service.engine.load.running and time.monotonic() < until:
            time.sleep(0.05)
        assert not server.service.engine.load.running
        visit.give(("long.txt", TEXT * 60), wait=False)
        visit.see("tokens read")
        visit.button("Stop").click()
        visit.see("Stopped. This is not part of the conversation.")
        assert visit.head == ""


BUSY = {"error": {"message": "no place", "type": "rate_limit_error", "code": "busy"}}
STORE = {"error": {"message": "the store", "type": "server_error", "code": "store"}}
CUT = 'data: {"type": "response.output_text.delta", "delta": "Once upon"}\n\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answered", "words"),
    [
        ({"status": 429, "headers": {"Retry-After": "7"}, "json": BUSY}, "again in 7 seconds"),
        ({"status": 503, "json": STORE}, "cannot write to its folder now"),
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "an error (502)"),
        ({"status": 200, "body": CUT}, "broke off"),
        ({"status": 200, "body": f"data: {json.dumps(STORE)}\n\n"}, "cannot write"),
        (None, "cannot be reached"),
    ],
    ids=["busy", "store", "proxy", "cut", "event", "offline"],
)  # fmt: skip
def test_errors_in_plain_words(visit, answered, words):
    """Nothing that was typed is lost, and it can be sent again."""

    def meet(route):
        route.abort() if answered is None else route.fulfill(**answered)

    visit.say("Hello")
    visit.page.route("**/v1/responses", meet)
    visit.page.fill("#box", "Is anybody there?")
    visit.button("Send").click()
    visit.page.locator("#trouble", has_text=words).wait_for()
    assert visit.box == "Is anybody there?"
    assert visit.said("answered")[1:] == (["Once upon"] if words == "broke off" else [])
    visit.page.reload()
    visit.see("Hello")
    assert visit.box == "Is anybody there?"
    visit.page.unroute("**/v1/responses")
    visit.say(visit.box)
    assert len(visit.said("answered")) == 2


@pytest.mark.slow
def test_a_turn_that_is_kept_no_longer(visit, server):
    name = visit.say("Hello")
    server.openai.responses.delete(name)
    visit.page.fill("#box", "And now?")
    visit.page.press("#box", "Enter")
    visit.page.locator("#trouble", has_text="keeps this turn no longer").wait_for()
    assert visit.box == "And now?"
    visit.page.reload()
    visit.see("Hello")  # its words are this browser's


# A key that is given while an earlier one is still being refused must not be asked for again.
REFUSAL = 1000  # milliseconds that it takes to refuse the list of sessions
SLOW_REFUSALS = f"""
const json = Response.prototype.json;
Response.prototype.json = async function () {{
  const isSlow = this.status === 401 && this.url.includes("sessions");
  if (isSlow) await new Promise((go) => setTimeout(go, {REFUSAL}));
  return json.call(this);
}};
"""


@pytest.mark.slow
def test_a_server_with_keys(chromium, tmp_path):
    key = new_key(tmp_path / "keys", "ann")
    with running(service_of(), keys=Keys.read(tmp_path / "keys")) as server:
        context = chromium.new_context()
        context.add_init_script(SLOW_REFUSALS)
        visit = Visit(context.new_page())
        visit.page.goto(server.url)
        asks = ("This server asks for a key.", "Is another one meant?")
        for given, why in zip(("wrong", key), asks, strict=True):
            visit.see(why)
            visit.page.get_by_label("Key", exact=True).fill(given)
            visit.button("Go on").click()
        visit.page.wait_for_function("() => document.title.startsWith('tiny')")
        visit.page.wait_for_timeout(2 * REFUSAL)
        assert not visit.page.get_by_label("Key", exact=True).is_visible()
        visit.page.evaluate("localStorage.setItem('cometlm:options', '{\"most\": 5}')")
        visit.say("Hello")
        assert key not in visit.page.evaluate("JSON.stringify(localStorage)")
        visit.page.reload()
        visit.see("Hello")
        visit.button("Options").click()
        visit.button("Forget the API key, too").click()
        visit.see("This server asks for a key")
        assert visit.page.evaluate("localStorage.length + sessionStorage.length") <= 1
        context.close()
        assert visit.errors == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """axe-core, which looks for what keeps people from using a page."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run(
        ["npm", "install", "--no-save", "--prefix", folder, "axe-core@4.14.1"], check=True
    )
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(chromium, server, axe, scheme):
    """axe finds nothing: empty, with branches, with an error and options, and on a phone."""
    with visiting(chromium, server, color_scheme=scheme) as visit:
        visit.page.evaluate(axe)

        def look():
            found = visit.page.evaluate("axe.run()")["violations"]
            assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []

        look()
        visit.say("Who tells the story?")
        visit.say("Why?")
        visit.button("Branch from here").click()
        visit.say("Where?")
        visit.page.locator("#sessions summary").first.click()
        look()
        visit.page.route("**/v1/responses", lambda route: route.abort())
        visit.page.fill("#box", "Hello?")
        visit.button("Send").click()
        visit.see("The server cannot be reached")
        visit.button("Options").click()
        look()
        visit.page.keyboard.press("Escape")
        visit.page.set_viewport_size({"width": 360, "height": 640})
        visit.page.get_by_role("button", name="Sessions").click()
        look()


@pytest.mark.slow
def test_with_the_keyboard_on_a_phone(chromium, server):
    with visiting(chromium, server, viewport={"width": 360, "height": 640}) as visit:
        visit.say("Hello")
        visit.page.evaluate("document.activeElement.blur()")
        visit.page.focus(".skip")
        visit.page.keyboard.press("Enter")
        assert visit.page.evaluate("document.activeElement.id") == "box"
        assert visit.page.locator("#sidebar").is_hidden()
        visit.page.get_by_role("button", name="Sessions").press("Enter")
        assert visit.page.locator("#sidebar").is_visible()
        more = visit.page.locator("#sessions summary").first
        more.press("Enter")
        visit.page.keyboard.press("Tab")
        assert visit.page.evaluate("document.activeElement.innerText") == "Copy"
        visit.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        visit.page.wait_for_load_state("networkidle")
        assert visit.page.evaluate("document.activeElement.innerText") == "Copy"  # in a new list
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_function("() => location.hash.startsWith('#sess_')")
        assert visit.page.locator("#sidebar").is_hidden()
        visit.page.get_by_role("button", name="Sessions").press("Enter")
        visit.page.keyboard.press("Escape")
        assert visit.page.locator("#sidebar").is_hidden()
        wide = "document.documentElement.scrollWidth"
        assert visit.page.evaluate(wide) <= 360
