"""Routes of sessions: list, inspect, sleep, fork, export, import, delete. A session is visible to the API key that created it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from zoo.errors import ZooError
from zoo.serving.kept import KeptSession
from zoo.serving.owners import owner_of
from zoo.serving.schemas import ApiError, Name, Strict
from zoo.serving.session_files import from_file, to_file
from zoo.serving.sessions import KeptSessions, missing
from zoo.serving.store import Record
from zoo.sessions.pool import PoolClosedError, SessionPool
from zoo.sessions.sleeping_model import sleeping_model
from zoo.sessions.snapshot import Snapshot

FILE = "application/octet-stream"  # type of exported sessions
FILE_SCHEMA = {"schema": {"type": "string", "format": "binary"}}


class SleepRequest(Strict):
    loops: int | None = Field(None, ge=1, le=1024, description="passes; default: as in the model")


class ForkRequest(Strict):
    id: Name = Field(description="id of the new session")


class SessionRoutes:
    """Routes of the sessions of one server.

    Args:
        settings: settings on which the sleeps of a stream depend; a file from a server with others is refused.
    """

    def __init__(self, sessions: KeptSessions, pool: SessionPool, settings: dict[str, str]) -> None:
        self.sessions, self.pool, self.settings = sessions, pool, settings
        self.model = sleeping_model(pool.model)

    def add(self, app: FastAPI, responses: dict[int | str, dict[str, Any]]) -> None:
        app.get("/v1/sessions", responses=responses)(self.all)
        app.get("/v1/sessions/{session}", responses=responses)(self.one)
        app.post("/v1/sessions/{session}/sleep", responses=responses)(self.sleep)
        app.post("/v1/sessions/{session}/fork", responses=responses)(self.fork)
        app.get("/v1/sessions/{session}/export", response_class=Response, responses={200: {"content": {FILE: FILE_SCHEMA}}, **responses})(
            self.export
        )
        app.post("/v1/sessions/{session}/import", responses=responses, openapi_extra={"requestBody": {"content": {FILE: FILE_SCHEMA}}})(
            self.import_
        )
        app.delete("/v1/sessions/{session}", responses=responses)(self.delete)

    def all(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "session"} for name in self.sessions.names(owner_of(request))]}

    def one(self, session: str, request: Request) -> dict[str, Any]:
        with self._existing(request, session) as kept:
            return self._about(kept)

    def sleep(self, session: str, request: Request, body: SleepRequest | None = None) -> dict[str, Any]:
        with self._existing(request, session) as kept:
            if self.model.config.window is None:
                raise ApiError(400, f"sleep: {self.model.config.name} never sleeps (evict: none)")
            try:
                kept.session.sleep(None if body is None else body.loops)
            except PoolClosedError:
                raise
            except ZooError as error:
                raise ApiError(400, str(error), "loops") from None
            return self._about(kept)

    def fork(self, session: str, body: ForkRequest, request: Request) -> dict[str, Any]:
        with self._existing(request, session) as kept:
            record = Record(kept.tokens, messages=kept.messages)
            return self._created(kept.owner, body.id, kept.session.snapshot(), record)

    def export(self, session: str, request: Request) -> Response:
        with self._existing(request, session) as kept:
            content = to_file(kept, self.model, self.settings)
        return Response(content, media_type=FILE, headers={"content-disposition": f'attachment; filename="{session}.safetensors"'})

    async def import_(self, session: Name, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type") != FILE:  # a web page of another origin could send any simpler type
            raise ApiError(415, f"content-type: {request.headers.get('content-type')}; want {FILE}", "content-type")
        return await run_in_threadpool(self._import, owner_of(request), session, await request.body())

    def _import(self, owner: str, name: str, content: bytes) -> dict[str, Any]:
        try:
            snapshot, record = from_file(content, self.model, self.settings)
        except ZooError as error:
            raise ApiError(400, f"file: {error}", "file", "session_refused") from None
        return self._created(owner, name, snapshot, record)

    def _created(self, owner: str, name: str, snapshot: Snapshot, record: Record) -> dict[str, Any]:
        """Make a session, and describe it."""
        kept = self.sessions.create(owner, name, snapshot, record)
        try:
            return self._about(kept)
        finally:
            self.sessions.release(kept)

    def delete(self, session: str, request: Request) -> dict[str, Any]:
        self.sessions.delete(owner_of(request), session)
        return {"id": session, "object": "session", "deleted": True}

    @contextmanager
    def _existing(self, request: Request, name: str) -> Iterator[KeptSession]:
        owner = owner_of(request)
        if not self.sessions.exists(owner, name):  # before it waits for a stream
            raise missing(name)
        kept = self.sessions.acquire(owner, name, new=False)
        try:
            yield kept
        finally:
            self.sessions.release(kept)

    def _about(self, kept: KeptSession) -> dict[str, Any]:
        now, config = kept.session.snapshot(), self.pool.model.config
        slept = all_sleeps(now, self.pool.schedule.due(config.window), config.loops)
        return {
            "id": kept.name,
            "object": "session",
            "tokens": len(kept.tokens),
            "window": {"tokens": now.ids.shape[1], "limit": config.window},
            "sleeps": [{"position": position, "loops": loops} for position, loops in slept],
            "norms": [None if fast is None else float(fast.norm()) for fast in now.state.fast],
        }


def all_sleeps(snapshot: Snapshot, limit: int | None, loops: int) -> list[tuple[int, int]]:
    """Return the position and loops of every sleep: those in `Snapshot.sleeps`, and those at full windows between them.

    Args:
        limit: number of tokens in a full window.
        loops: passes of a sleep at a full window.
    """
    found, last = list[tuple[int, int]](), 0
    for position, irregular in snapshot.sleeps:
        while limit is not None and last + limit < position:
            last += limit
            found.append((last, loops))
        found.append((position, irregular))
        last = position
    while limit is not None and len(found) < snapshot.counts.sleeps:
        last += limit
        found.append((last, loops))
    return found
