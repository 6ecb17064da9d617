"""LangChain's clients and lm-eval's `local-completions` against the server, on loopback. Needs `pip install '.[integrations]'`."""

import pytest
import torch

import zoo
from tests.zoo.serving.local import local
from tests.zoo.serving.test_conversations import PLAIN, folder
from zoo.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.extended

END = 1
TALK = [("system", "Answer briefly, please."), ("human", "the quick brown fox jumps")]
TEXTS = ["the quick", "the quick brown fox jumps over the lazy dog and the end of the world is the beginning of the end"]


class Direct:
    """What the model itself says, with the tokenizer of transformers."""

    def __init__(self, model, place):
        from transformers import AutoTokenizer  # a failure, not a skip, where it is not installed

        self.model, self.tokenizer = model, AutoTokenizer.from_pretrained(place)

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def chat(self, talk):
        roles = {"human": "user", "ai": "assistant"}
        messages = [{"role": roles.get(role, role), "content": content} for role, content in talk]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def says(self, ids, tokens, **how):
        said = list(map(int, zoo.Session(self.model).generate(torch.tensor([ids]), tokens, stop=[END], **how)))
        return self.tokenizer.decode(said[:-1] if said[-1] == END else said)

    def score(self, ids, start):
        """Log-likelihood of the tokens from `start`, and whether each is the most likely one."""
        logprobs = zoo.Session(self.model).feed(torch.tensor([ids]))[0, start - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(ids[start:])
        return float(logprobs[range(len(wanted)), wanted].sum()), bool((logprobs.argmax(-1) == wanted).all())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place = tmp_path_factory.mktemp("served")
    model = folder(place / "model", PLAIN, 40)
    with local(model, load_tokenizer(place / "model", model.config.vocab_size)) as server:
        yield server, Direct(model, place / "model"), place / "model"


def test_langchain_chat(served):
    from langchain_openai import ChatOpenAI

    server, direct, _ = served
    fields = {"model": "model", "base_url": f"{server.url}/v1", "api_key": "none", "max_tokens": 12}
    chat, ids = ChatOpenAI(temperature=0, **fields), direct.chat(TALK)
    first = chat.invoke(TALK)
    assert first.content == direct.says(ids, 12)
    assert first.usage_metadata["input_tokens"] == len(ids)
    assert "".join(piece.content for piece in chat.stream(TALK)) == first.content
    more = [*TALK, ("ai", first.content), ("human", "over the lazy dog")]
    assert [answer.content for answer in chat.batch([TALK, more])] == [first.content, direct.says(direct.chat(more), 12)]
    kept = ChatOpenAI(temperature=0, extra_body={"session": "talk"}, **fields)
    assert [kept.invoke(talk).content for talk in (TALK, more)] == [first.content, direct.says(direct.chat(more), 12)]
    assert kept.invoke(more).usage_metadata["input_token_details"]["cache_read"] == len(direct.chat(more))
    seeded = ChatOpenAI(temperature=1, seed=3, top_p=0.9, **fields)
    assert seeded.invoke(TALK).content == direct.says(ids, 12, temperature=1.0, seed=3, top_p=0.9)


def test_langchain_completions(served):
    from langchain_openai import OpenAI

    server, direct, _ = served
    client = OpenAI(model="model", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=12)
    want = [direct.says(direct.ids(text), 12) for text in TEXTS]
    assert client.invoke(TEXTS[0]) == "".join(client.stream(TEXTS[0])) == want[0]
    assert client.batch(TEXTS) == want


@pytest.mark.parametrize(
    "how",
    [{}, {"batch_size": 4}, {"num_concurrent": 3}, {"tokenized_requests": False}],
    ids=["one", "batch", "concurrent", "text"],
)
def test_lm_eval(served, how):
    """Log-likelihoods of continuations, of whole texts, and answers, also of texts that are longer than the window."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    server, direct, place = served
    api = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="model", tokenizer=str(place), max_gen_toks=12, **how)

    def requests(kind, each):
        return [Instance(kind, {}, arguments, n) for n, arguments in enumerate(each)]

    likely = [(text, direct.says(direct.ids(text), 1)) for text in TEXTS]
    pairs = [*likely, *((text, more) for text in TEXTS for more in (" over", " end of the lazy dog", ""))][:-1]
    pairs = [(context, more) for context, more in pairs if more]
    want = []
    for context, more in pairs:
        want.append(direct.score(direct.ids(context + more), len(direct.ids(context))))
    found = api.loglikelihood(requests("loglikelihood", pairs))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in want], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    assert {greedy for _, greedy in want} == {True, False}
    rolling = api.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]))
    assert rolling == pytest.approx([direct.score([END, *direct.ids(text)], 1)[0] for text in TEXTS], abs=1e-3)
    asked = [(text, {"until": ["\n\n"], "do_sample": False}) for text in TEXTS]
    assert api.generate_until(requests("generate_until", asked)) == [direct.says(direct.ids(text), 12).split("\n\n")[0] for text in TEXTS]
