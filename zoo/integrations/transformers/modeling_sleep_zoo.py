"""A Sleep Zoo model as a PreTrainedModel. Shapes: B rows, T tokens, width D, vocabulary V.

`save_pretrained` copies this file into the folder that it writes, so that `trust_remote_code=True` loads it where this package is
installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from zoo.checkpoints.companions import GENERATION, read_companions, write_companions
from zoo.checkpoints.plain import cast, plain_tensors, unwrap
from zoo.config import resolve
from zoo.errors import ZooError
from zoo.initialise import init_weights
from zoo.integrations.transformers.streams import Streams, as_streams
from zoo.loss import chunks, predicted
from zoo.model import Model

IGNORED = -100  # label of a token without loss


class SleepZooConfig(PreTrainedConfig):
    """Config of a Sleep Zoo model.

    Args:
        zoo: fields of `zoo.ModelConfig`, as in zoo.yaml. Changing one of them, as in `config.zoo["loops"] = 4`, affects
            models that are loaded with the config afterwards.
    """

    model_type = "sleep_zoo"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers appends a list

    def __init__(self, zoo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.zoo = dict(zoo or {})
        if zoo:  # transformers also builds a config without arguments
            config = resolve(zoo)
            kwargs |= {"vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": len(config.pattern)}
            # for trainers that multiply by the weight of the head themselves, such as trl's
            kwargs |= {"logit_scale": config.logits_scale, "final_logit_softcapping": config.logits_cap}
        super().__init__(**{**kwargs, "tie_word_embeddings": False})  # a tied head has no tensor of its own


class SleepZooPreTrainedModel(PreTrainedModel):
    """Base class of the two models: loading, saving and initial weights."""

    config_class = SleepZooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _is_stateful = True
    _supports_sdpa = True

    @property
    def zoo(self) -> Model:
        """The model itself, for `zoo.save`, `zoo.Session` and everything else."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder that `save_pretrained` wrote; see `PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if name is not None and Path(name).is_dir():
            model.zoo.companions = read_companions(Path(name))
        return loaded

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write a folder that `from_pretrained` reads, with the tokenizer and other files that came with the model.

        Raises:
            ZooError: a model with adapters, or other tensors that are not part of its config.
        """
        if kwargs.get("state_dict") is None:  # of a trainer that has gathered the weights
            plain_tensors(self.zoo)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            folder = Path(save_directory)
            write_companions({name: content for name, content in self.zoo.companions.items() if not (folder / name).exists()}, folder)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings."""
        return self.zoo.embed

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse another size: it is part of the config. Returns the token embeddings. Raises ZooError."""
        if new_num_tokens not in (None, size := self.zoo.config.vocab_size):
            raise ZooError(f"vocab_size: {size}: cannot become {new_num_tokens} in a model; create another one")
        return self.zoo.embed

    def _init_weights(self, module: nn.Module) -> None:  # called for what `from_pretrained` did not find
        missing = [name for name, parameter in self.zoo.named_parameters() if not getattr(parameter, "_is_hf_initialized", False)]
        raise ZooError(f"{self.zoo.config.name}: tensor '{missing[0]}' is missing in the folder ({len(missing)} such tensors)")


class SleepZooModel(SleepZooPreTrainedModel):
    """The model without its head. It sleeps after every window."""

    def __init__(self, config: SleepZooConfig) -> None:
        super().__init__(config)
        if not config.zoo:
            raise ZooError("config: zoo: is missing; want a folder that save_pretrained wrote, or from_zoo(zoo.load(FOLDER))")
        self.inner = cast(Model(resolve(config.zoo)), torch.get_default_dtype())
        if not self.inner.embed.weight.is_meta:
            init_weights(self.inner, torch.Generator(self.inner.embed.weight.device).manual_seed(0))
            for tensor in chain(self.inner.parameters(), self.inner.buffers()):
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        self.gradient_checkpointing = False
        """True to recompute the activations of each pass in the backward pass; `activation_checkpointing_enable` sets it."""
        self.post_init()

    @property
    def zoo(self) -> Model:
        return self.inner

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **unused: Any
    ) -> BaseModelOutput:
        """Return the hidden states of every token after the final norm, [B, T, D]; the arguments are those of `hidden`."""
        _refuse_unsupported(unused)
        return BaseModelOutput(last_hidden_state=self.zoo.normed(self.hidden(input_ids, attention_mask, position_ids)))

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Return the hidden states of every token, [B, T, D], as `Model.wake` does, with a sleep after each window.

        Args:
            input_ids: [B, T] int64.
            attention_mask, position_ids: padding and packed documents; see `as_streams`.
        """
        ids, place = as_streams(input_ids, attention_mask, position_ids)
        recompute, state, pieces = self.gradient_checkpointing and self.training, None, []
        chunks = ids.split(self.zoo.config.window or ids.shape[1], dim=1)
        for chunk in chunks:
            awake = self.zoo.wake(chunk, state, recompute=recompute)
            pieces.append(awake[0])
            if chunk is not chunks[-1]:
                first_pass = awake if self.zoo.wakes_as_it_sleeps else None
                state = self.zoo.consolidate(chunk, state, awake=first_pass, recompute=recompute)
        h = torch.cat(pieces, dim=1)
        if place is None:
            return h
        there = place >= 0
        return h.new_zeros(input_ids.numel(), *h.shape[2:]).index_put((place[there],), h[there]).view(*input_ids.shape, *h.shape[2:])


class SleepZooForCausalLM(SleepZooPreTrainedModel, GenerationMixin):
    """The model with its head. `generate` and the loss sleep."""

    def __init__(self, config: SleepZooConfig) -> None:
        super().__init__(config)
        self.model = SleepZooModel(config)
        self.post_init()

    @property
    def zoo(self) -> Model:
        return self.model.zoo

    @classmethod
    def from_zoo(cls, model: Model) -> Self:
        """Return the same model, not a copy, for transformers: with its weights, and its settings for `generate`."""
        model = unwrap(model)
        with torch.device("meta"):
            made = cls(SleepZooConfig(zoo=model.config.model_dump(mode="json", exclude_defaults=True)))
        made.train(model.training).model.inner = model
        if GENERATION in model.companions:
            made.generation_config = GenerationConfig.from_dict(json.loads(model.companions[GENERATION]))
        return made

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.zoo.head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Streams | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Return the loss, or logits [B, T, V].

        Args:
            input_ids: [B, T] int64.
            attention_mask, position_ids: padding and packed documents; see `as_streams`.
            labels: [B, T], -100 where there is no loss. The loss is that of `zoo.Model.loss`, with its sleeps. In evaluation mode,
                logits are returned too, zeros where nothing predicts a token with loss.
            past_key_values: streams to continue.
            use_cache: return the streams, to continue them without gradients; default: outside of training, unless a row is padded
                on the right or holds several documents.
            logits_to_keep: number of last tokens whose logits are computed; 0: all.
            num_items_in_batch: divisor of the loss in training; default, and in evaluation mode: the tokens that carry loss.
        Raises:
            ZooError: as `zoo.Model.loss`, `as_streams` and `Streams.read`; embeddings in place of tokens, a cache of another kind,
                or `output_hidden_states` and `output_attentions`, which a model that sleeps does not have.
        """
        _refuse_unsupported(unused)
        if not isinstance(past_key_values, Streams | None):
            raise ZooError(f"past_key_values: {type(past_key_values).__name__}; want the Streams that forward returns, or None")
        if labels is not None:
            if past_key_values is not None:
                raise ZooError("past_key_values: not with labels, whose loss is that of whole streams; want None")
            return self._supervised(input_ids, attention_mask, position_ids, labels, num_items_in_batch)
        packed = past_key_values is None and len(as_streams(input_ids, attention_mask, position_ids)[0]) > len(input_ids)
        if packed and use_cache:
            raise ZooError("use_cache: True; the documents that position_ids pack into a row have no streams to continue, want False")
        if use_cache is None:
            use_cache = not (torch.is_grad_enabled() or packed) and (attention_mask is None or bool(attention_mask[:, -1].all()))
        if past_key_values is None and not use_cache:
            h = self.model.hidden(input_ids, attention_mask, position_ids)
            return CausalLMOutputWithPast(logits=self.zoo.logits(h[:, -logits_to_keep:]))
        streams = Streams(self.zoo) if past_key_values is None else past_key_values
        logits = streams.read(input_ids, attention_mask, last=logits_to_keep == 1)
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], past_key_values=streams)

    def _supervised(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, labels: Tensor, divisor: Tensor | int | None
    ) -> CausalLMOutputWithPast:
        ids, place = as_streams(input_ids, attention_mask, position_ids)
        targets = labels if place is None else labels.flatten()[place.clamp(min=0)].masked_fill(place < 0, IGNORED)
        supervised = targets != IGNORED
        supervised[:, 0] = False
        if not predicted(supervised, chunks(supervised, self.zoo.config)).any():
            return CausalLMOutputWithPast(loss=self.zoo.norm.weight.sum() * 0.0)
        recompute = self.model.gradient_checkpointing and self.training
        answers = self.zoo.answers(ids, supervised, recompute="passes" if recompute else "nothing")
        wide = answers.logits.to(torch.promote_types(answers.logits.dtype, torch.float32))
        losses = F.cross_entropy(wide, targets.flatten()[answers.place], reduction="none")
        # a trainer also counts the first token of a row that is padded on the left, which nothing predicts
        loss = losses.mean() if divisor is None or not self.training else losses.sum() / divisor
        if self.training:
            return CausalLMOutputWithPast(loss=loss)
        there = answers.place if place is None else place.flatten()[answers.place]
        logits = answers.logits.new_zeros(input_ids.numel(), answers.logits.shape[-1])
        logits = logits.index_put((there - 1,), answers.logits)  # token t is predicted at t - 1
        return CausalLMOutputWithPast(loss=loss, logits=logits.view(*input_ids.shape, -1))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:  # `forward` makes the streams
        return False


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Raise ZooError for arguments of transformers' models that would change the result, or ask for more of it."""
    for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
        if given.get(name) is not None and given[name] is not False:
            raise ZooError(f"{name}: is not supported; want input_ids, and zoo.Model.wake for hidden states")
