"""Models as data: the config, the YAML files that hold it, and names with suffixes such as `jet2b-sleep6-hard2000`.

A model file may have one key that is not a field of the config: `sleep:` holds fields that apply if the name has a suffix.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Hashable, Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zoo.errors import ZooError, counted
from zoo.eviction import evictions
from zoo.files import as_path
from zoo.layer_pattern import expand
from zoo.registry import Registry, nearest

M = TypeVar("M", bound=BaseModel)


class Exit(BaseModel):
    """Choice of the wake loop whose states the head reads; see `zoo.blocks.exit_gate`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    loop: int | None = Field(None, ge=0, description="index of the loop, from 0")
    threshold: float | None = Field(1.0, gt=0, description="exit at the first loop where the cumulative exit probability reaches this")
    weighted: bool = Field(False, description="without a threshold: average the loops, weighted by their exit probability")


BETWEEN_PASSES = frozenset({"inject", "residual_gates"})
"""Fields of a model that are also its parameters between passes, which no upstream checkpoint has."""


class ModelConfig(BaseModel):
    """Everything that determines what a model computes. Each file in `configs/models/` holds one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    about: str = ""
    vocab_size: int = Field(ge=1)
    d_model: int = Field(ge=1)
    layers: str = Field(description="layer pattern, for example 'jet*14 attn (jet*4 swa)*2'")
    blocks: dict[str, dict[str, Any]] = Field({}, description="options of each kind of block in the pattern")
    mlp: str = Field("swiglu", description="layer pattern of MLPs, such as 'swiglu moe*3'; one word: every layer; 'none': no MLP")
    mlps: dict[str, dict[str, Any]] = Field({}, description="options of each kind of MLP in the pattern")
    d_ff: int | None = Field(None, ge=1, description="MLP width; default 8/3 d_model, rounded up to a multiple of 16")
    norm: Literal["plain", "wide", "centred"] = Field("plain", description="kind of RMSNorm; see `zoo.blocks.norm`")
    norm_eps: float = Field(1e-6, gt=0)
    tie_embeddings: bool = False
    embed_scale: float = Field(1.0, description="factor of the token embeddings where they enter the first block")
    logits_scale: float = Field(1.0, description="factor of the logits")
    logits_cap: float | None = Field(None, gt=0, description="bound of the logits: cap * tanh(logits / cap)")
    learned_positions: bool | Literal["asleep"] = Field(
        False, description="add a learned embedding of the position in a window that restarts; 'asleep': only during a sleep"
    )

    loops: int = Field(1, ge=1, description="passes of the span over a window while asleep")
    evict: str = Field("none", description="what happens to the window cache at the end of a chunk")
    window: int | None = Field(None, ge=1, description="L, the number of tokens in a window")
    span: tuple[int, int] | None = Field(None, description="first and last looped layer, both included; default: all layers")
    sleep_on: Literal["unsupervised", "every"] = Field(
        "unsupervised", description="chunks to consolidate in training: those without loss, or every one"
    )
    inject: bool | Literal["bounded"] = Field(
        False,
        description="add the span's first input, times a learned gate, before every later pass; 'bounded': mix the two with a gate "
        "from 0 to 1, so that it cannot make hidden states grow",
    )
    carry: bool = Field(
        True, description="whether a pass starts from the fast weights of the previous pass, rather than from those at the chunk's start"
    )
    feed_back: bool = Field(
        True, description="whether a pass starts from the hidden states of the previous pass, rather than from the span's first input"
    )
    loop_norm: bool = Field(False, description="apply the final norm between passes")
    residual_gates: int = Field(
        0,
        ge=0,
        description="number of passes that add their own input, times a learned scalar, to their output; later passes use the last gate",
    )
    wake_loops: int = Field(1, ge=1, le=1000, description="passes of every layer while awake, each with its own window cache")
    exit: Exit | None = Field(None, description="exit gate of the wake loops")

    hub: str | None = Field(None, description="Hugging Face repository of pretrained weights: OWNER/NAME or OWNER/NAME@REVISION")
    upstream: dict[str, Any] = Field({}, description="config.json of the checkpoint family; its `model_type` names the family")

    @property
    def pattern(self) -> tuple[str, ...]:
        """Kind of each layer."""
        return expand(self.layers)

    @property
    def mlp_pattern(self) -> tuple[str, ...]:
        """Kind of MLP of each layer, or "none"; blocks whose options say `mlp: false` have none either."""
        kinds = expand(self.mlp, "mlp")
        return kinds * len(self.pattern) if len(kinds) == 1 else kinds

    @property
    def looped(self) -> range:
        """Indices of the layers in the span."""
        first, last = self.span or (0, len(self.pattern) - 1)
        return range(first, last + 1)

    @property
    def mlp_width(self) -> int:
        return self.d_ff or -(-8 * self.d_model // 48) * 16

    def computed(self) -> dict[str, Any]:
        """Return the fields that affect what a model computes."""
        return self.model_dump(mode="json", exclude={"name", "about", "hub", "upstream"})

    def yaml(self) -> str:
        """Return YAML from which `zoo.create` builds the same model."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=100)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, with those that peft reads when it chooses layers and merges adapters."""
        return {**self.model_dump(mode="json"), "model_type": "sleep_zoo", "tie_word_embeddings": self.tie_embeddings}


def shipped(folder: str) -> dict[str, Traversable]:
    """Return the YAML files of `configs/<folder>` by name."""
    there = files("zoo.configs").joinpath(folder).iterdir()
    return {path.name.removesuffix(".yaml"): path for path in there if path.name.endswith(".yaml")}


models: Registry[Traversable | Mapping[str, Any]] = Registry("model", "models")  # a YAML file, or a mapping of the same form
for _name, _path in shipped("models").items():
    models.register(_name, _path)

_SUFFIX = re.compile(r"-(sleep|hard|slide|full)(\d{0,9})")
_SUFFIX_HELP = "allowed: -sleep<N>, then -hard<L>, -slide<L> or -full"


def resolve(source: str | Path | Mapping[str, Any] | ModelConfig, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the config described by a name, a YAML file or a mapping, with overrides applied.

    Args:
        source: a model name with suffixes ("jet2b-sleep6"), the path of a YAML file, or a config.
        overrides: fields to replace; nested mappings are merged ({"blocks": {"gdn": {"heads": 2}}}).
    Raises:
        ZooError: an unknown name, suffix or field, with the nearest allowed one; or a value that does not fit.
    """
    overrides = dict(overrides or {})
    if isinstance(source, ModelConfig):
        label, fields = source.name, source.model_dump(exclude_defaults=True)
    elif isinstance(source, Mapping):
        label, fields = str(source.get("name", "config")), dict(source)
    elif isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
        label, fields = str(source), read_yaml(as_path(source, "model"))
    elif isinstance(source, str):
        label, fields = source, _from_name(source)
    else:
        raise ZooError(f"model: {reprlib.repr(source)}; want the name of a model, a YAML file, a folder or a config")
    fields.pop("sleep", None)
    if isinstance(evict := overrides.get("evict"), str) and not evictions.get(evict, f"{label}: evict").uses_window:
        fields.pop("window", None)
    config = validate(ModelConfig, merge(fields, overrides), label)
    _check(config, label)
    return config


def _check(config: ModelConfig, label: str) -> None:
    layers = len(config.pattern)
    if len(config.mlp_pattern) != layers:
        raise ZooError(
            f"{label}: mlp: {len(config.mlp_pattern)} MLPs for {counted(layers, 'layer')}; want one for each, or a single word for all"
        )
    if config.span is not None and config.span[0] > config.span[1]:
        raise ZooError(f"{label}: span: {list(config.span)}: the first layer is after the last; want them in order")
    if config.span is not None and not 0 <= config.span[0] <= config.span[1] < layers:
        raise ZooError(f"{label}: span: {list(config.span)} lies outside the layers 0 to {layers - 1} (first and last, both included)")
    eviction = evictions.get(config.evict, f"{label}: evict")
    if eviction.uses_window and config.window is None:
        raise ZooError(f"{label}: window: evict '{config.evict}' needs the number of tokens in a window, at least 1")
    if not eviction.uses_window and config.window is not None:
        raise ZooError(f"{label}: window: {config.window} is not used under evict '{config.evict}'")
    if not config.feed_back and (unread := [field for field in ("inject", "loop_norm") if getattr(config, field)]):
        value = getattr(config, unread[0])
        raise ZooError(f"{label}: {unread[0]}: {value} changes what a pass gets from the previous one; feed_back: false passes nothing on")
    if config.wake_loops > 1 and (config.loops > 1 or config.evict != "none" or len(config.looped) < layers):
        raise ZooError(
            f"{label}: wake_loops: {config.wake_loops} loops while awake; want loops 1, evict 'none' and every layer in the span"
        )
    if config.exit is not None and config.exit.loop is not None and config.exit.loop >= config.wake_loops > 1:
        raise ZooError(f"{label}: exit.loop: {config.exit.loop} is not one of the {config.wake_loops} wake loops, counted from 0")


def _from_name(name: str) -> dict[str, Any]:
    """Return the fields of `name`: those of its base model, then those of its suffixes."""
    known = models.names()
    base = max((k for k in known if name == k or name.startswith(f"{k}-")), key=len, default=None)
    if base is None:
        if "/" in name or name in ("", ".", ".."):
            raise ZooError(f"model: '{name}' is neither a folder nor a YAML file; want one of these, or the name of a model")
        raise ZooError(f"unknown model '{name}'; {nearest(_SUFFIX.split(name)[0], known)}; see `zoo list`")
    fields = _fields(models.get(base), base)
    rest = name[len(base) :]
    if rest:
        fields = merge(fields, fields.pop("sleep", {}))
    order = ["sleep", "evict"]
    for suffix in re.findall(r"-[^-]*", rest):
        match = _SUFFIX.fullmatch(suffix)
        if match is None or (match[1] == "full") == bool(match[2]):
            raise ZooError(f"{name}: unknown suffix '{suffix}'; {_SUFFIX_HELP}")
        kind = "sleep" if match[1] == "sleep" else "evict"
        if kind not in order:
            raise ZooError(f"{name}: suffix '{suffix}' is out of order; {_SUFFIX_HELP}")
        order = order[order.index(kind) + 1 :]
        if match[1] == "sleep":
            fields["loops"] = int(match[2])
        elif match[1] == "full":
            fields["evict"], fields["window"] = "none", None
        else:
            fields["evict"], fields["window"] = {"hard": "hard", "slide": "sliding"}[match[1]], int(match[2])
    return {**fields, "name": name}


def _fields(source: Any, name: str) -> dict[str, Any]:
    """Return the fields of a registered model: a YAML file, or a mapping of the same form."""
    return dict(source) if isinstance(source, Mapping) else read_yaml(source)


def merge(fields: Mapping[str, Any], more: Mapping[str, Any], *, whole: Collection[str] = ()) -> dict[str, Any]:
    """Return `fields` updated with `more`; nested mappings are merged, except under the keys `whole`, where they are replaced."""
    merged = dict(fields)
    for key, value in more.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and key not in whole:
            value = merge(old, value, whole=whole)
        merged[key] = value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML whose dates are text, as in JSON, and whose mappings have each key once."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate field '{key.value}'", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `["d_model=128", "blocks.gdn.heads=2"]` into nested fields; values are YAML."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        path, equals, value = pair.partition("=")
        if not equals or not all(path.split(".")):
            raise ZooError(f"'{pair}': want field=value, for example d_model=128 or blocks.gdn.heads=2")
        try:
            fields = merge(fields, nested(path, yaml.load(value, _Loader)))
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ZooError(f"'{pair}': the value is not YAML") from None
    return fields


def nested(path: str, value: Any) -> Any:
    """Turn `"blocks.gdn.heads"` and 2 into {"blocks": {"gdn": {"heads": 2}}}."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def read_yaml(path: Traversable) -> dict[str, Any]:
    """Read a YAML file that holds a mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).replace('"<unicode string>", ', "").split()).removesuffix(" ^")
        raise ZooError(f"{path}: not YAML: {why[:200]}") from None
    if not isinstance(content, dict):
        raise ZooError(f"{path}: want a mapping of fields")
    return content


def read_shipped(folder: str, what: str, source: str | Path) -> dict[str, Any]:
    """Read a YAML file, or the one of this name in `configs/<folder>`; errors call it a `what`."""
    known = shipped(folder)
    if (path := as_path(source, what)) and str(source) not in known and path.suffix not in (".yaml", ".yml"):
        if path.is_dir() or len(path.parts) > 1:
            raise ZooError(f"{source}: {f'holds no {what}' if path.is_dir() else 'no such file or folder'}; want a YAML file")
        raise ZooError(f"unknown {what} '{source}'; {nearest(str(source), known)}, or a YAML file")
    return read_yaml(known.get(str(source), Path(source)))


def validate(form: type[M], fields: Mapping[str, Any], label: str) -> M:
    """Return `form(**fields)`; raises a ZooError of one line that starts with `label`."""
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        # a misspelt field first: it is often why another one is missing
        found = error.errors(include_url=False)
        first = min(found, key=lambda e: e["type"] != "extra_forbidden")
        if first["type"] != "extra_forbidden":  # of the alternatives of a union, the one that fails further inside was meant
            inside = [each for each in found if f"{path_of(each['loc'])}.".startswith(f"{path_of(first['loc'])}.")]
            first = max(inside, key=lambda each: len(path_of(each["loc"])))
        where = path_of(first["loc"])
        if first["type"] == "extra_forbidden":
            problem = f"unknown field; {nearest(str(first['loc'][-1]), _fields_at(form, first['loc'][:-1]))}"
        elif first["type"] == "missing":
            problem = "is missing"
        elif first["type"] == "value_error":  # our own validators name the field
            problem = str(first["ctx"]["error"])
        else:
            first_end, *others = [wanted(each["type"], each["msg"], each.get("ctx", {})) for each in found if path_of(each["loc"]) == where]
            others = [end.removeprefix("allowed: ").removeprefix("want ") for end in others]  # the alternatives of a union
            problem = f"{reprlib.repr(first['input'])}: {', or '.join([first_end, *others])}"
        raise ZooError(f"{label}: {where + ': ' if where else ''}{problem}") from None


def path_of(place: Iterable[int | str]) -> str:
    """Return the dotted path of a place where pydantic found an error, without the alternatives of a union, such as `bool`."""
    return ".".join(str(part) for part in place if not re.search(r"^(constrained-)?(str|float|int|bool|dict)$|[\[\](]", str(part)))


WANTED = {
    "want an integer": "int_type int_parsing int_parsing_size int_from_float",
    "want a number": "float_type float_parsing",
    "want a finite number": "finite_number",
    "want true or false": "bool_type bool_parsing",
    "want text": "string_type",
    "want a list": "list_type tuple_type",
    "want a mapping of fields": "dict_type model_type model_attributes_type",
    "must be greater than {gt}": "greater_than",
    "must be greater than or equal to {ge}": "greater_than_equal",
    "must be less than {lt}": "less_than",
    "must be less than or equal to {le}": "less_than_equal",
    "want at least {min_length}": "too_short",
    "want at most {max_length}": "too_long",
    "allowed: {expected}": "literal_error",
}
"""Ends of our error messages, each with the pydantic error types that it covers."""


def wanted(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """Return the end of an error message in this package's words."""
    for words, kinds in WANTED.items():
        if kind in kinds.split():
            sizes = {name: counted(context[name], "entry") for name in ("min_length", "max_length") if name in context}
            end = words.format(**{**context, **sizes})
            return end.replace(" or ", ", ") if kind == "literal_error" else end
    return message[0].lower() + message[1:]


def _fields_at(form: Any, path: tuple[int | str, ...]) -> list[str]:
    """Return the fields of the pydantic model at a path, which may lead through lists and mappings of such models."""
    for part in path:
        if field := form.model_fields.get(part):
            form = _form_in(field.annotation) or form
    return list(form.model_fields)


def _form_in(annotation: Any) -> Any:
    """Return the first pydantic model in a type such as dict[str, Model], or None."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(filter(None, map(_form_in, get_args(annotation))), None)
