"""Sleep Zoo models in lm-evaluation-harness: `zoo lm-eval run --model zoo --model_args pretrained=FOLDER --tasks ...`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.checkpoints.hub import local_folder
from zoo.checkpoints.own import configure, load
from zoo.checkpoints.plain import one_line
from zoo.devices import usable_device
from zoo.errors import ZooError
from zoo.inputs import check_flag
from zoo.schedule import new_schedule
from zoo.sessions.session import Session
from zoo.text.chat_templates import choose
from zoo.text.corpus import END_OF_BYTES
from zoo.text.tokenizers import FolderTokenizer, load_tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError:
    raise ZooError("lm-eval: not installed; pip install 'sleep-zoo[integrations]'") from None

LARGEST = 2**26  # maximum number of logits that are held at once
ALIGNED = 512  # tokens in a piece of a model without a window
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
"""Options of generation that a task may set, besides `until`, `max_gen_toks` and `do_sample`."""


class Row(NamedTuple):
    """A text to score."""

    context: list[int]
    """Tokens before the scored ones, at least one."""
    answer: list[int]
    """Tokens to score."""


@register_model("zoo")
class ZooLM(TemplateLM):
    """A model in a folder, read as streams that sleep. Long texts are never cut.

    Args:
        pretrained: folder of a model, a training run or an upstream checkpoint, or hf://OWNER/NAME[@REVISION].
        device: device, or its name. lm-eval passes cuda:0 by default; without a GPU, that means the CPU.
        dtype: dtype of the weights by name; default: as stored.
        batch_size: number of streams that are read together. "auto" means 8.
        loops: passes per sleep; default: as in the model.
        when: when streams sleep, such as "full" or "interval(512)".
        sleep_before_answer: sleep on a context, apart from its last token, before its answer is scored or generated.
        fields: other config fields, such as `evict` and `window`.
    Raises:
        ZooError: as `zoo.load`, or an option that the model has no use for.
    """

    def __init__(
        self,
        pretrained: str = "",
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        loops: int | None = None,
        when: str = "full",
        sleep_before_answer: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ZooError("model_args: pretrained is missing; want pretrained=FOLDER")
        check_flag("sleep_before_answer", sleep_before_answer)
        folder = local_folder(pretrained, "pretrained")
        given = fields if loops is None else {**fields, "loops": loops}
        self.config = configure(folder, given)
        for option, value in {"loops": loops, "sleep_before_answer": sleep_before_answer}.items():
            if value and self.config.window is None:
                raise ZooError(f"{option}: {value}; {self.config.name} never sleeps (evict: {self.config.evict})")
        self.when = new_schedule(when)
        self.when.due(self.config.window)  # refuses a schedule that does not fit
        self._device = usable_device("cpu" if str(device).startswith("cuda") and not torch.cuda.is_available() else device)
        self.model = load(folder, device=self._device, dtype=dtype, **given).eval()
        self.text = load_tokenizer(folder, self.config.vocab_size)
        self.batch_size = _size(batch_size)
        self.sleep_first = sleep_before_answer
        self.template: str | None = None
        """Name of the chat template."""

    @property
    def eot_token_id(self) -> int:
        """The EOS token."""
        if not self.text.stop and isinstance(self.text, FolderTokenizer):
            raise ZooError(f"{self.config.name}: the tokenizer names no end token; set eos_token in tokenizer_config.json")
        return self.text.stop[0] if self.text.stop else END_OF_BYTES

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context: the BOS token, else the EOS token."""
        begin = self.text.encode("")
        return begin[0] if begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name by which lm-eval caches requests."""
        return str(self.config.name)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Return the tokens of a text, with the special ones at its ends unless it begins with the first of them."""
        if add_special_tokens is None:
            begin = self.text.special.get("bos_token")
            add_special_tokens = not (begin and string.startswith(begin))
        return self.text.encode(string, special=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text."""
        return self.text.render(chat_history, template=self.template, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the template of this name, or the default. Returns its text, which lm-eval records."""
        self.template = chat_template if isinstance(chat_template, str) else None
        return choose(self.text.templates, self.template, None) if chat_template else None

    def _loglikelihood_tokens(self, requests: list[Any], **unused: Any) -> list[tuple[float, bool]]:
        scores = self._scores([Row(context, answer) for _, context, answer in requests], sleep=self.sleep_first)
        found = [(score[0].double().sum().item(), bool(score[1].all())) for score in scores]
        for (key, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, 0 for an empty one: one stream, which sleeps as it is read."""
        texts = [request.args[0] for request in requests]
        rows = [Row([self.prefix_token_id], self.tok_encode(text, add_special_tokens=False)) for text in texts]
        return [score[0].double().sum().item() for score in self._scores(rows, sleep=False)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop sequence."""
        said = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for batch in self._batches([(len(prompt), str(request.args[1])) for prompt, request in zip(prompts, requests, strict=True)]):
            texts = self._generate([prompts[i] for i in batch], requests[batch[0]].args[1])
            for i, text in zip(batch, texts, strict=True):
                said[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return said

    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Return the texts that follow prompts of the same length."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options))
        until, tokens, sampled = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        given["temperature"] = given.get("temperature", 1.0) if sampled else 0.0
        if unknown := sorted(given.keys() - set(SAMPLING)):
            raise ZooError(f"gen_kwargs: {unknown[0]}; allowed: until, max_gen_toks, do_sample, {', '.join(SAMPLING)}")
        ids, session = torch.tensor(prompts, device=self._device), Session(self.model, len(prompts), when=self.when)
        if self.sleep_first and ids.shape[1] > 1:
            session.read(ids[:, :-1])
            session.sleep()
            ids = ids[:, -1:]
        decoders, texts, open_rows = [self.text.decoder(prompt) for prompt in prompts], [""] * len(prompts), set(range(len(prompts)))
        for token in session.generate(ids, tokens, stop=self.text.stop, **given):
            for n in list(open_rows):
                if (one := int(token[n])) in self.text.stop:
                    open_rows.remove(n)
                    continue
                texts[n] += decoders[n](one)
                if any(stop in texts[n] for stop in until if stop):
                    open_rows.remove(n)
            if not open_rows:
                break
        whole = [text + decode.flush() for text, decode in zip(texts, decoders, strict=True)]
        return [postprocess_generated_text(text, until, None) for text in whole]

    def _scores(self, rows: list[Row], *, sleep: bool) -> list[Tensor]:
        """Return the log-probability of each token of each answer, and whether it is the likeliest: [2, n] for each row.

        Args:
            sleep: read the context apart from its last token, and sleep, before the rest.
        """
        scores = [torch.zeros(2, 0)] * len(rows)
        # contexts that are slept on end together; otherwise padding on the right reaches no token of a row
        keys = [(len(row.context) if sleep else 0, -len(row.context) - len(row.answer)) for row in rows]
        for batch in self._batches(keys, same=1):
            for i, score in zip(batch, self._score([rows[i] for i in batch], sleep=sleep), strict=True):
                scores[i] = score
        return scores

    @torch.no_grad()
    def _score(self, rows: Sequence[Row], *, sleep: bool) -> list[Tensor]:
        ids = pad_sequence([torch.tensor([*row.context, *row.answer]) for row in rows], batch_first=True).to(self._device)
        session, first = Session(self.model, len(rows), when=self.when), min(len(row.context) for row in rows) - 1
        if not sleep:  # pieces that begin with a window are the same in every batch
            first -= first % (self.when.due(self.config.window) or self.config.window or ALIGNED)
        if first:
            session.read(ids[:, :first])
        if sleep:
            session.sleep()
        pieces = []
        for start in range(first, ids.shape[1] - 1, width := max(1, LARGEST // (len(rows) * self.config.vocab_size))):
            targets = ids[:, start + 1 : start + 1 + width]
            logits = session.feed(ids[:, start : start + targets.shape[1]])
            logp = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
            pieces.append(torch.stack([logp.gather(-1, targets[..., None])[..., 0], (logp.argmax(-1) == targets).to(logp.dtype)]))
        scores = torch.cat(pieces, dim=-1).cpu() if pieces else torch.zeros(2, len(rows), 0)  # one token at most, nothing to predict
        begins = [len(row.context) - 1 - first for row in rows]
        return [scores[:, n, begin : begin + len(row.answer)] for n, (row, begin) in enumerate(zip(rows, begins, strict=True))]

    def _batches(self, keys: Sequence[tuple[Any, ...]], same: int | None = None) -> Iterator[list[int]]:
        """Yield the indices of keys in order of the keys, in batches that agree in the first `same` entries; default: in all."""
        order = sorted(range(len(keys)), key=lambda i: keys[i])
        for _, alike in groupby(order, key=lambda i: keys[i][:same]):
            group = list(alike)
            yield from (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))


def _size(batch_size: int | str) -> int:
    size = "8" if str(batch_size).startswith("auto") else str(batch_size)
    if not size.isdecimal() or int(size) < 1:
        raise ZooError(f"batch_size: {batch_size}; want a number of streams, at least 1, or auto")
    return int(size)


def run(arguments: Sequence[str]) -> None:
    """Run lm-eval's own command line, which finds the model `zoo` here. Raises ZooError: it refuses its arguments."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except ZooError:
        raise
    except (KeyError, ValueError) as error:
        raise ZooError(f"lm-eval: {one_line(error)}") from error
    finally:
        sys.argv = before
