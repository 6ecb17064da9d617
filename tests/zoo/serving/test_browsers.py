"""Web pages cannot use the server unless they are allowed to, under any name by which they reach it."""

import http.client

import pytest
from click.testing import CliRunner

import zoo
from tests.zoo.serving.local import local
from zoo.cli import main
from zoo.errors import ZooError
from zoo.serving import draining
from zoo.text.tokenizers import ByteTokenizer

FIELDS = {"layers": "gdn", "d_model": 16, "d_ff": 16, "vocab_size": 256}
PAGE = "https://page.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


@pytest.fixture(scope="module")
def model():
    return zoo.create("gdn4-sleep2-hard16", **FIELDS)


def status(server, host, path="/v1/models", **headers):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {**({} if host is None else {"host": host}), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_hosts(model):
    with local(model, ByteTokenizer(256), hosts=["zoo.example"]) as server:
        for host in ("localhost", "LocalHost:8000", "127.0.0.1", "10.1.2.3:8000", "[::1]:8000", "zoo.example", "Zoo.Example:80"):
            assert status(server, host)[0] == 200, host
        for host in ("evil.example", "zoo.example.evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "a@localhost",
                     "localhost/", "[::1", "", "evil.example:8000", "example"):  # fmt: skip
            code, answer = status(server, host)
            assert code == 400, host
            assert "host: " in answer
        assert "allowed: addresses, localhost, zoo.example" in answer
        assert status(server, "evil.example", "/health")[0] == 400
    with local(model, ByteTokenizer(256), hosts=["*"]) as server:
        assert status(server, "any.example")[0] == 200


def cors(response):
    return {name: value for name, value in response.items() if name.startswith("access-control-")}


def preflight(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    response = connection.getresponse()
    return response.status, cors(response.headers)


def test_cors_is_off_unless_asked(model):
    with local(model, ByteTokenizer(256), keys=["key"]) as server:
        assert preflight(server)[0] >= 400
        assert not preflight(server)[1]
        assert not cors(server.open("/v1/models", authorization="Bearer key", origin=PAGE).headers)
    with local(model, ByteTokenizer(256), keys=["key"], origins=[PAGE]) as server:
        code, headers = preflight(server)
        assert code == 200
        assert headers["access-control-allow-origin"] == PAGE
        assert "authorization" in headers["access-control-allow-headers"]
        assert cors(server.open("/v1/models", authorization="Bearer key", origin=PAGE).headers)["access-control-allow-origin"] == PAGE
        assert not cors(server.open("/v1/models", authorization="Bearer key", origin="https://evil.example").headers).get(
            "access-control-allow-origin"
        )
        assert server.ask("/v1/models", origin=PAGE)[0] == 401
    with local(model, ByteTokenizer(256), origins=["*"]) as server:
        assert cors(server.open("/v1/models", origin="https://any.example").headers)["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"hosts": ["zoo.example:80"]}, "allow_host: 'zoo.example:80'; want a name without a port"),
        ({"hosts": ["http://zoo.example"]}, "allow_host: "),
        ({"origins": ["page.example"]}, "allow_origin: 'page.example'; want an origin such as https://example.com"),
        ({"origins": ["https://page.example/"]}, "allow_origin: "),
    ],
)
def test_bad_names_are_refused(model, how, message):
    with pytest.raises(ZooError, match=message):
        local(model, ByteTokenizer(256), **how).__enter__()


@pytest.mark.parametrize(
    ("options", "warned"), [([], False), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", "k"], False)]
)
def test_a_warning_without_a_key(model, tmp_path, monkeypatch, options, warned):
    seen = []
    monkeypatch.setattr(draining, "run", lambda app, *_: seen.append(app))
    zoo.save(model, tmp_path / "model")
    result = CliRunner().invoke(main, ["serve", str(tmp_path / "model"), "--port", "0", "--allow-host", "zoo", *options])
    assert result.exit_code == 0, result.output
    assert ("everyone who can reach this address" in result.stderr) == warned
    seen[0].state.server.pool.close()
