"""Requests and errors of the HTTP server, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class GenerationRequest(_Strict):
    """Fields that completions and chat have in common."""

    model: str
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    n: Literal[1] = 1
    session: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="keep the stream under this id for the next request")


class CompletionRequest(GenerationRequest):
    """A prompt, as text or token ids. It continues the session's stream if there is one."""

    prompt: str | list[Annotated[int, Field(ge=0, lt=2**31)]]
    max_tokens: int = Field(16, ge=1)


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(GenerationRequest):
    """A conversation. With a session, send all of it or only the new messages: those already read are skipped."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


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
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
