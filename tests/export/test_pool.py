"""A pool and a server on a bundle answer as those on the model do."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from click.testing import CliRunner

import zoo
from tests.zoo.serving.local import local, post
from tests.zoo.sessions.test_threads import check
from zoo.cli import main
from zoo.export.runtime import ExportedModel
from zoo.text.tokenizers import ByteTokenizer


@pytest.mark.parametrize("case", ["hard", "sliding"])
def test_streams_of_a_pool(bundles, case, tmp_path):
    """At different positions, with more streams than slots, left early, asleep together, saved and loaded."""
    model, folder, _ = bundles(case)
    exported = ExportedModel(folder)

    def use(pool, n):
        stream, prompt = pool.open(), torch.arange(1, 3 * n + 2)[None] % 11
        answer = [int(token) for token in stream.generate(prompt, 13)]
        for token in stream.generate(None, 9, temperature=1.0, seed=n):
            answer.append(int(token))
            if len(answer) > 15 + n:
                break
        stream.sleep()
        stream.save(tmp_path / f"{n}")
        twin = stream.fork().load(tmp_path / f"{n}")
        return answer, stream.feed(prompt), twin.feed(prompt)

    results = []
    for runner in (model, exported):
        with zoo.SessionPool(runner, slots=2, streams=8) as pool, ThreadPoolExecutor(4) as threads:
            results.append(list(threads.map(lambda n, pool=pool: use(pool, n), range(4))))
    for (want, logits, _), (answer, found, twin) in zip(*results, strict=True):
        assert answer == want
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(twin, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.extended
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["hard", "sliding"])
def test_random_threads(bundles, case, seed, tmp_path):
    """Every call of random threads on a bundle returns what a session of the PyTorch model returns."""
    model, folder, _ = bundles(case)
    with zoo.SessionPool(ExportedModel(folder), slots=2, streams=20) as pool:
        check(pool, model, seed, tmp_path, loops=[None])


def test_the_bound_in_bytes(bundles):
    exported = ExportedModel(bundles("hard").folder)
    with zoo.SessionPool(exported, slots=2) as pool:
        zoo.SessionPool(exported, slots=2, max_bytes=pool.bytes).close()
        with pytest.raises(zoo.ZooError, match="max_bytes"):
            zoo.SessionPool(exported, slots=2, max_bytes=pool.bytes - 1)


def test_commands_take_bundles(tmp_path, monkeypatch):
    """`zoo chat` and `zoo serve` with a bundle answer as with the folder that it was made from."""
    blocks = {"gdn": {"heads": 2}}  # as in other bundles, which trace the same block
    model = zoo.create("gdn4-sleep2-hard6", layers="gdn", d_model=16, d_ff=16, vocab_size=256, blocks=blocks)
    zoo.save(model, tmp_path / "folder")
    zoo.export.export(model, tmp_path / "bundle")
    said = [
        CliRunner().invoke(main, ["chat", str(tmp_path / kind), "--tokens", "12", "--temperature", "0"], input="hi\nmore\n").output.split()
        for kind in ("folder", "bundle")
    ]
    assert said[0] == said[1]
    result = CliRunner().invoke(main, ["chat", str(tmp_path / "bundle"), "--dtype", "float16"])
    assert (result.exit_code, "dtype float16" in result.output) == (2, True)
    for device, message in {"tensorrt": "has no prediction.engine; zoo-export", "cuda:7": "unknown provider 'cuda:7'"}.items():
        result = CliRunner().invoke(main, ["chat", str(tmp_path / "bundle"), "--device", device])
        assert (result.exit_code, message in result.output) == (2, True)
    result = CliRunner().invoke(main, ["chat", str(tmp_path / "bundle"), "--loops", "5"], input="")
    assert (result.exit_code, "loops: 5; this bundle was exported with 2" in result.output) == (2, True)
    served = []
    monkeypatch.setattr("zoo.serving.draining.run", lambda app, *_: served.append(app))
    assert CliRunner().invoke(main, ["serve", str(tmp_path / "bundle"), "--port", "0"]).exit_code == 0
    served[0].state.server.pool.close()
    messages = [{"role": "user", "content": "hi"}]
    answers = []
    for opened in (model, ExportedModel(tmp_path / "bundle")):
        with local(opened, ByteTokenizer(256), store=tmp_path / type(opened).__name__) as server:
            first = server.chat(messages, session="s", logprobs=True)["choices"][0]
            again = server.chat(messages, session="s")
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"]
            status, body = post(server, "/v1/sessions/s/sleep", {"loops": 5})
            assert (status, body.get("error", {}).get("param")) == ((200, None) if opened is model else (400, "loops"))
            assert post(server, "/v1/sessions/s/sleep")[0] == 200
            logprobs = [entry["logprob"] for entry in first["logprobs"]["content"]]
            answers.append((first["message"]["content"], again["choices"][0]["message"]["content"], logprobs))
    assert answers[0][:2] == answers[1][:2]
    assert answers[0][2] == pytest.approx(answers[1][2], abs=1e-4)


def test_a_bundle_is_not_compiled(bundles):
    exported = ExportedModel(bundles("hard").folder)
    for make in (zoo.Session, zoo.SessionPool):
        with pytest.raises(zoo.ZooError, match="compile: True; "):
            make(exported, compile=True)


def test_a_stream_at_its_greatest_length_ends_alone(bundles):
    """Others of its batch continue, and too long a prompt is refused before any of it is read."""
    model, folder, _ = bundles("full")
    want = [int(token) for token in zoo.Session(model).generate(torch.tensor([[3]]), 5)]
    with zoo.SessionPool(ExportedModel(folder), slots=2, context=4096) as pool, ThreadPoolExecutor(2) as threads:
        assert pool.context == 6
        full, other = pool.open(), pool.open()
        refused = "the pool holds a context of 6"
        with pytest.raises(zoo.ZooError, match=refused):
            full.feed(torch.ones(1, 7, dtype=torch.int64))
        assert full.stats().tokens == 0
        full.read(torch.ones(1, 5, dtype=torch.int64))
        ended = threads.submit(lambda: list(full.generate(None, 9)))
        answer = threads.submit(lambda: [int(token) for token in other.generate(torch.tensor([[3]]), 5)])
        with pytest.raises(zoo.ZooError, match=refused):
            ended.result()
        assert answer.result() == want
