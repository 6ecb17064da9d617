"""Routes of sessions: list, inspect, sleep, fork, delete. A session is visible to the API key that created it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field

from zoo.errors import ZooError
from zoo.serving.kept import KeptSession
from zoo.serving.owners import owner_of
from zoo.serving.schemas import ApiError, Name, Strict
from zoo.serving.sessions import KeptSessions
from zoo.serving.store import StoreError
from zoo.sessions.pool import PoolClosedError, SessionPool
from zoo.sessions.snapshot import Snapshot


class SleepRequest(Strict):
    loops: int | None = Field(None, ge=1, le=1024, description="passes; default: as in the model")


class ForkRequest(Strict):
    id: Name = Field(description="id of the new session")


class SessionRoutes:
    def __init__(self, sessions: KeptSessions, pool: SessionPool) -> None:
        self.sessions, self.pool = sessions, pool

    def add(self, app: FastAPI, responses: dict[int | str, dict[str, Any]]) -> None:
        app.get("/v1/sessions", responses=responses)(self.all)
        app.get("/v1/sessions/{session}", responses=responses)(self.one)
        app.post("/v1/sessions/{session}/sleep", responses=responses)(self.sleep)
        app.post("/v1/sessions/{session}/fork", responses=responses)(self.fork)
        app.delete("/v1/sessions/{session}", responses=responses)(self.delete)

    def all(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "session"} for name in self.sessions.names(owner_of(request))]}

    def one(self, session: str, request: Request) -> dict[str, Any]:
        with self._existing(request, session) as kept:
            return self._about(kept)

    def sleep(self, session: str, request: Request, body: SleepRequest | None = None) -> dict[str, Any]:
        with self._existing(request, session) as kept:
            try:
                kept.session.sleep(None if body is None else body.loops)
            except PoolClosedError:
                raise
            except ZooError as error:
                raise ApiError(400, str(error), "loops") from None
            return self._about(kept)

    def fork(self, session: str, body: ForkRequest, request: Request) -> dict[str, Any]:
        if self.sessions.exists(owner_of(request), body.id):
            raise ApiError(409, f"id: '{body.id}' already exists", "id", "session_exists")
        with self._existing(request, session) as kept:
            twin = self.sessions.acquire(kept.owner, body.id)
            twin.session.restore(kept.session.snapshot())
            twin.tokens, twin.messages = list(kept.tokens), list(kept.messages)
            self.sessions.release(twin)
            return self._about(twin)

    def delete(self, session: str, request: Request) -> dict[str, Any]:
        try:
            deleted = self.sessions.delete(owner_of(request), session)
        except StoreError as error:
            raise ApiError(503, str(error), "session", "store_failing") from None
        if not deleted:
            raise ApiError(404, f"session: '{session}' does not exist, or is busy", "session", "session_not_found")
        return {"id": session, "object": "session", "deleted": True}

    @contextmanager
    def _existing(self, request: Request, name: str) -> Iterator[KeptSession]:
        owner = owner_of(request)
        if not self.sessions.exists(owner, name):
            raise ApiError(404, f"session: '{name}' does not exist", "session", "session_not_found")
        kept = self.sessions.acquire(owner, name)
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
