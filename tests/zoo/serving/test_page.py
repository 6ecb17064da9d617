"""The page at /: what it loads and requests, and, in a browser, a conversation over a sleep (`make test-page`)."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import zoo
from tests.zoo.serving.browser import browser
from tests.zoo.serving.local import local
from zoo.serving.page import FILES, FOLDER
from zoo.text.tokenizers import ByteTokenizer

FIELDS = {"layers": "(attn gdn)*3", "d_model": 16, "d_ff": 16, "vocab_size": 256}
SCRIPT = (FOLDER / "page.js").read_text()


@pytest.fixture(scope="module")
def model():
    """A model that says nothing but letters and spaces."""
    made = zoo.create("gdn4-sleep2-hard64", **FIELDS)
    says = torch.tensor([chr(byte) in " abcdefghijklmnopqrstuvwxyz" for byte in range(256)])
    with torch.no_grad():
        made.head.weight[~says] = -made.head.weight[says].mean(0)
    return made


@pytest.fixture(scope="module")
def server(model):
    with local(model, ByteTokenizer(256)) as running:
        yield running


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.inline = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline.append(data.strip())


def test_files(server):
    """The policy forbids other hosts and scripts inside the page, and the page has none."""
    for path, name in FILES.items():
        with server.open(path, method="GET") as response:
            assert response.read() == (FOLDER / name).read_bytes()
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert re.findall(r"https?:|\*", policy) == []
    page = Elements((FOLDER / "index.html").read_text())
    loaded = {fields.get("src") or fields.get("href") for _, fields in page.found} - {None, "data:,"}
    assert {f"/{path}" for path in loaded} == FILES.keys() - {"/"}
    assert not any(page.inline)
    assert not [name for _, fields in page.found for name in fields if name == "style" or name.startswith("on")]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|localStorage|sessionStorage|document\.cookie|innerHTML|eval\(", SCRIPT)


def test_elements():
    """Every element that the script names is in the page, once, and every field has a label."""
    page = Elements((FOLDER / "index.html").read_text()).found
    ids = [fields["id"] for _, fields in page if "id" in fields]
    assert len(ids) == len(set(ids))
    lists = re.findall(r"for \(const id of \[(.*?)\]", SCRIPT)
    assert {*re.findall(r'element\("(\w+)"\)', SCRIPT), *re.findall(r'"(\w+)"', ",".join(lists))} <= set(ids)
    labelled = {fields["for"] for tag, fields in page if tag == "label"}
    assert {fields["id"] for tag, fields in page if tag in ("input", "textarea")} == labelled


def test_without_the_page(model):
    with local(model, ByteTokenizer(256), page=False) as server:
        assert {server.ask(path)[0] for path in FILES} == {404}
        assert server.ask("/v1/models")[0] == 200


def test_the_page_needs_no_key_but_its_requests_do(model):
    with local(model, ByteTokenizer(256), keys=["secret"]) as server:
        for path in FILES:
            assert server.open(path).status == 200
        assert server.ask("/v1/models")[0] == 401
        assert server.ask("/v1/models", authorization="Bearer secret")[0] == 200


def test_requests(server):
    """The requests of the script, in its order. A browser sends them in `make test-page`."""
    paths = {re.sub(r"\$\{session\}", "page-1", path) for path in re.findall(r"request\([\"`](.*?)[\"`]", SCRIPT)}
    assert paths == {"v1/models", "v1/chat/completions", "v1/sessions/page-1", "v1/sessions/page-1/sleep"}
    fields = re.search(r"const body = \{(.*?)\n  \};", SCRIPT, re.DOTALL)[1]
    sent = {"session": "page-1", "append": True, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    sent |= {"temperature": 0.8, "max_tokens": 4}
    assert {*re.findall(r"(?:^|[,{] ?)\s*(\w+)(?=[:,])", re.sub(r"\[.*?\]", "[]", fields), re.MULTILINE)} == {"model", *sent}
    assert server.ask("/v1/models")[1]["data"][0]["id"] == "model"
    assert server.events("/v1/chat/completions", sent)[-1].get("error") is None
    about = server.ask("/v1/sessions/page-1")[1]
    assert {"tokens", "limit"} == about["window"].keys()
    assert len(about["norms"]) == 6
    assert server.ask("/v1/sessions/page-1/sleep", {}, "POST")[0] in (200, 400)
    assert server.ask("/v1/sessions/page-1", method="DELETE")[0] == 200


@pytest.mark.page
def test_a_conversation_over_a_sleep(model, tmp_path):
    """The window fills, sleeps, and the fast weights change, as the server says; nothing is refused by the page's own policy."""
    pictures = Path(os.environ.get("ZOO_PAGE_PICTURES", tmp_path))
    with local(model, ByteTokenizer(256), keys=["secret"]) as server, browser() as page:
        page.open(f"{server.url}/")
        page.wait("!document.getElementById('login').hidden")
        page.type("#key", "wrong")
        page.click("#login button")
        page.wait("document.getElementById('key').value === ''")
        page.type("#key", "secret")
        page.click("#login button")
        page.wait("document.getElementById('login').hidden && document.title === 'model'")
        session = page.run("return session")

        def about():
            status, found = server.ask(f"/v1/sessions/{session}", authorization="Bearer secret")
            assert status == 200
            return found

        def say(text):
            page.type("#text", text)
            page.click("#send")
            page.wait("document.getElementById('send').disabled === false && latest !== null")

        page.run("document.getElementById('tokens').value = 24; document.getElementById('temperature').value = 0")
        say("Hello")
        page.wait("latest.window.tokens > 0")
        first = about()
        assert page.text("#fill") == [f"{first['window']['tokens']} of 64 tokens"]
        assert page.text("#sleeps li") == []
        assert len(page.text(".norm")) == 3
        page.screenshot(pictures / "page-awake.png")
        sleeps = 0
        while not sleeps:
            turns = len(page.text("#chat .user"))
            say(f"And again, message {turns}")
            page.wait(f"document.querySelectorAll('#chat .user').length === {turns + 1} && !document.getElementById('send').disabled")
            sleeps = len(about()["sleeps"])
        page.wait("document.querySelectorAll('#sleeps li').length > 0")
        after = about()
        assert page.text("#fill") == [f"{after['window']['tokens']} of 64 tokens"]
        assert page.text("#sleeps li") == [f"after token {one['position']}, N = {one['loops']}" for one in reversed(after["sleeps"])]
        assert page.text("#chat .slept")
        page.wait("document.querySelectorAll('.norm line').length === 3")
        page.screenshot(pictures / "page-slept.png")
        if after["window"]["tokens"]:
            page.type("#loops", "3")
            page.click("#now")
            page.wait(f"document.querySelectorAll('#sleeps li').length === {len(after['sleeps']) + 1}")
            assert about()["sleeps"][-1]["loops"] == 3
            assert about()["window"]["tokens"] == 0
        page.click("#new")
        page.wait("document.querySelectorAll('#chat li').length === 0")
        assert server.ask(f"/v1/sessions/{session}", authorization="Bearer secret")[0] == 404
        refused = [line for line in page.log() if "401" not in line]
        assert refused == []
