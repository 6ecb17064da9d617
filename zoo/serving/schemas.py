"""Requests and errors of the HTTP server, in OpenAI's form. A field that is not listed here, or has another value, is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

WANTED = "wanted"
"""Type of the errors that `want` raises."""


def want(message: str) -> WrapValidator:
    """A validator whose error is `want` and this message, in place of those of pydantic."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError(WANTED, f"want {message}") from None

    return WrapValidator(check)


NAME, NAMES = r"^[A-Za-z0-9_-]{1,64}$", "1 to 64 letters, digits, _ and -"
Name = Annotated[str, Field(pattern=NAME), want(NAMES)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Text | list[Text], want("text or a list of texts, none of them empty")]
Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]
T = TypeVar("T")
Several = Annotated[list[T], Field(min_length=1, max_length=2048)]
PromptField = Annotated[
    str | Ids | Several[Ids] | Several[str], want("text, token ids, a list of texts, or a list of lists of token ids; at most 2048 prompts")
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Token = Annotated[str, Field(pattern=r"^\d{1,9}$"), want("a token id")]
Bias = Annotated[float, Field(ge=-100, le=100), want("a number from -100 to 100")]


class Strict(BaseModel):
    """Fields in exactly these types. An optional field may be null, which means that it is absent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        fields = handler.resolve_ref_schema(schema)
        for name, field in fields.get("properties", {}).items():
            if name not in fields.get("required", []):
                fields["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return schema


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Strict):
    """Fields that completions and chat have in common. `user` has no effect."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[Token, Bias] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Texts | None = None
    n: int = Field(1, ge=1, le=128)
    session: Name | None = Field(None, description="keep the stream under this id for the next request")
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, fields: Any) -> Any:
        if isinstance(fields, bytes):  # not sent as JSON; see `zoo.serving.errors`
            return fields
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("body: lone surrogates are not text") from None
        return fields

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self


class CompletionRequest(GenerationRequest):
    """A prompt, or several, as text or token ids. With a session, it is appended to the session's stream."""

    prompt: PromptField
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Literal[1] = 1
    suffix: None = None

    @property
    def top(self) -> int | None:
        """Number of most likely tokens to report with each token; None: no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[Ids]:
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]  # type: ignore[return-value]

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0; want at least 1 without echo")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.function_call)):
            raise ValueError("content: missing")
        return self

    def fields(self) -> dict[str, Any]:
        """Return the message as chat templates expect it, with its parts of text joined."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        return {**self.model_dump(exclude_none=True), "content": content}


class NamedSchema(Strict):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool = True


class ResponseFormat(Strict):
    type: Literal["text", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.json_schema is None) != (self.type == "text"):
            raise ValueError(f"json_schema: {'is missing' if self.json_schema is None else 'only with type: json_schema'}")
        return self


class ChatRequest(GenerationRequest):
    """A conversation: all of it, or with `append` only the messages that the session has not had.

    `safety_identifier`, `prompt_cache_key`, `metadata` and `service_tier` have no effect.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    append: bool = False
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    verbosity: Literal["medium"] = "medium"
    parallel_tool_calls: Literal[True] = True
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    function_call: Literal["none"] = "none"
    functions: None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    web_search_options: None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def echo(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        return self


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """An error response: an HTTP status and a body in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status = status
        self.headers = {"retry-after": "1"} if status in (429, 503) else None
        kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
