"""The sessions of one server: in memory while they are in use, and in the store if there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Condition, Event, Thread

from zoo.errors import ZooError, counted
from zoo.serving.kept import KeptSession
from zoo.serving.places import StoreError, TakenOverError
from zoo.serving.prefixes import Prefixes
from zoo.serving.schemas import ApiError
from zoo.serving.store import OtherServerError, Record, Store
from zoo.sessions.pool import PoolClosedError, PoolFullError, SessionPool
from zoo.sessions.snapshot import Snapshot
from zoo.system import release_freed

TICK = 1.0  # seconds between two looks at idle sessions
SETTLED = 5.0  # seconds without a request after which the state of a session is written


class KeptSessions:
    """Sessions of one server. Each is bound to the API key of its owner, and one request at a time uses it.

    Args:
        idle: seconds without a request after which a session may leave memory.
        prefixes: states that sessions of one owner share.
        store: keeps sessions when they leave memory or the process ends.
        queue, wait: number of requests that may wait for a free stream, and for how many seconds.
    """

    def __init__(
        self, pool: SessionPool, idle: float, prefixes: Prefixes, store: Store | None = None, *, queue: int = 0, wait: float = 0.0
    ) -> None:
        self.prefixes, self.store = prefixes, store
        self.failing = False
        """True from an error of the store until everything has been written and the store works again."""
        self._pool, self._idle, self._lock, self._ended = pool, idle, Condition(), Event()
        self._queue, self._wait = queue, wait
        self.waiting = 0
        """Number of requests that wait for a free stream."""
        self._kept: dict[tuple[str, str], KeptSession] = {}
        self._writing = set[tuple[str, str]]()
        """Sessions that are written to the store or deleted between two requests; other requests for them wait."""
        first = pool.open()
        self._empty = first.snapshot()
        first.close()

    def __len__(self) -> int:
        """Number of sessions in memory."""
        return len(self._kept)

    def names(self, owner: str) -> list[str]:
        """Return the ids of an owner's sessions."""
        with self._lock:
            held = {name for of, name in self._kept if of == owner}
        with self._using_store():
            return sorted(held.union(self.store.names(owner) if self.store else ()))

    def exists(self, owner: str, name: str) -> bool:
        with self._using_store():
            return (owner, name) in self._kept or (self.store is not None and self.store.exists(owner, name))

    def acquire(self, owner: str, name: str | None, *, new: bool | None = None) -> KeptSession:
        """Return the session with this id, opening it if there is none; without an id, a session for one request.

        Waits for a free stream if there is none.

        Args:
            new: refuse a session that exists (True), or one that does not (False).
        Raises:
            ApiError: the session is busy, or there is no room for it, or it cannot be stored.
        """
        kept = self._claim(owner, name, new)
        if self.store is not None and name:
            try:
                with self._using_store():
                    if new is not None and kept.journal is None:
                        _check_new(name, new, not self.store.exists(owner, name))
                    self._agree_with_store(kept, self.store)
            except BaseException:
                self.release(kept, forget=True)
                raise
        return kept

    @contextmanager
    def _using_store(self) -> Iterator[None]:
        """Turn an error of the store into an ApiError with status 503."""
        try:
            yield
        except PoolClosedError:
            raise
        except OtherServerError as error:
            raise ApiError(503, str(error), "session", "session_of_another_server") from None
        except (OSError, ZooError) as error:
            self._report(error)
            why = error if isinstance(error, ZooError) else f"store: {error.strerror}"
            raise ApiError(503, f"{why}; try again later", "session", "store_failing") from None

    def _report(self, error: Exception) -> None:
        """Remember that the store fails, unless only another process has taken a session over."""
        self.failing = self.failing or (isinstance(error, OSError | StoreError) and not isinstance(error, TakenOverError))

    def _claim(self, owner: str, name: str | None, new: bool | None) -> KeptSession:
        """Return the session of `acquire`, busy from now on, as it is in memory."""
        end, unwritable = time.monotonic() + self._wait, set[KeptSession]()
        while True:
            with self._lock:
                self._wait_while_writing(owner, name)
                kept = self._found(owner, name, new)
                if kept is not None:
                    kept.busy, kept.saved = True, False
                    return kept
                idle = self._claim_idle(unwritable)
                if idle is None:
                    self._wait_for_room(end)
            if idle is not None and not self._put_away(idle):  # without the lock: a disk may be slow
                unwritable.add(idle)

    def _wait_while_writing(self, owner: str, name: str | None) -> None:
        """Wait while a session is written to the store or deleted between two requests."""
        while (owner, name) in self._writing:
            self._lock.wait()

    def _found(self, owner: str, name: str | None, new: bool | None) -> KeptSession | None:
        """Return the session of `acquire`, or None if there is no room for it."""
        if name and (kept := self._kept.get((owner, name))):
            _check_new(name, new, False)
            if kept.busy:
                raise _busy(name)
            return kept
        if name and self.store is None:
            _check_new(name, new, True)
        try:
            kept = KeptSession(self._pool.open(), self.prefixes, self._empty, owner, name)
        except PoolFullError:
            return None
        if name:
            self._kept[owner, name] = kept
        return kept

    def _claim_idle(self, but: set[KeptSession]) -> KeptSession | None:
        """Return the session that has been idle for longest, for `_put_away`; None without a store, or if there is none."""
        idle = [kept for kept in self._kept.values() if not (kept.busy or kept.key in self._writing or kept in but)]
        if self.store is None or not idle:
            return None
        longest = min(idle, key=lambda kept: kept.used)
        self._writing.add(longest.key)
        return longest

    def _wait_for_room(self, end: float) -> None:
        """Wait until another request has ended. Raises ApiError at the time `end`, or if too many are waiting."""
        left = end - time.monotonic()
        if left <= 0 or self.waiting >= self._queue:
            full = "the only stream is in use" if self._pool.streams == 1 else f"all {self._pool.streams} streams are in use"
            full += f", and {counted(self.waiting, 'other request')} already waiting for one" if left > 0 and self.waiting else ""
            raise ApiError(429, f"{full}; try again later", None, "too_many_sessions")
        self.waiting += 1
        try:
            self._lock.wait(left)
        finally:
            self.waiting -= 1

    def _agree_with_store(self, kept: KeptSession, store: Store) -> None:
        """Take over a session that another process has used, and write what could not be written before. Raises ZooError."""
        assert kept.name is not None
        if kept.journal is None or not kept.journal.check():
            kept.recall(store.open(kept.owner, kept.name))
        kept.store()

    def release(self, kept: KeptSession, *, forget: bool = False) -> None:
        """End a request's use of its session, and write it to the store if that works."""
        if kept.name and not forget:
            self._store(kept)
        kept.used, kept.left = time.monotonic(), Event()
        closes = not kept.name or (forget and kept.journal is None)
        if closes:
            kept.session.close()
        with self._lock:
            if closes:
                self._kept.pop(kept.key, None)
            kept.busy = False
            self._lock.notify_all()

    def create(self, owner: str, name: str, snapshot: Snapshot, record: Record) -> KeptSession:
        """Return a new session with this state and conversation, written to the store. Raises ApiError, and leaves nothing behind then."""
        _check_new(name, True, not self.exists(owner, name))  # before it waits for a stream
        kept = self.acquire(owner, name, new=True)
        try:
            kept.session.restore(snapshot)
            kept.tokens, kept.messages = list(record.tokens), list(record.messages)
            with self._using_store():
                kept.store()
                kept.store_state()
        except BaseException:
            if kept.journal is not None:
                with suppress(StoreError):
                    kept.journal.delete()
            with self._lock:
                self._forget(kept)
                self._lock.notify_all()
            raise
        return kept

    def _forget(self, kept: KeptSession) -> None:
        """Remove a session from memory."""
        assert kept.name is not None
        self._kept.pop(kept.key, None)
        with suppress(ZooError):  # the pool is closed
            kept.session.close()
        self.prefixes.forget(kept.owner, kept.name)

    def delete(self, owner: str, name: str) -> None:
        """Close a session and forget its states. Raises ApiError: there is none with this id, or it is busy, for example."""
        with self._lock:
            self._wait_while_writing(owner, name)
            kept = self._kept.get((owner, name))
            if kept is not None and kept.busy:
                raise _busy(name)
            self._writing.add((owner, name))
        with self._marked((owner, name)):
            with self._using_store():
                if not self.exists(owner, name):
                    raise missing(name)
                if self.store is not None:  # without the lock: a disk may be slow
                    journal = kept.journal if kept is not None else None
                    (journal if journal is not None and journal.check() else self.store.open(owner, name)).delete()
            with self._lock:
                if kept is not None:
                    self._forget(kept)
                self.prefixes.forget(owner, name)

    def tend(self) -> None:
        """Until `close`, write the states of idle sessions to the store, and move them out of memory."""
        Thread(target=self._tend, name="zoo-sessions", daemon=True).start()

    def _tend(self) -> None:
        while not self._ended.wait(TICK):
            failed, stored = self.failing, True
            with self._lock:
                all_kept = list(self._kept.values())
            for kept in all_kept:
                with self._lock:
                    idle = time.monotonic() - kept.used
                    leaves, due = idle > self._idle, not kept.saved and (failed or idle > SETTLED)
                    if kept.busy or kept.key in self._writing or not (leaves or due) or self._kept.get(kept.key) is not kept:
                        continue
                    self._writing.add(kept.key)
                if leaves:
                    stored &= self._put_away(kept)
                else:
                    with self._marked(kept.key):
                        stored &= self._store(kept, state=idle > SETTLED)
            if failed and stored and self.store is not None:
                self.failing = not self._written(self.store.check)

    def wake(self) -> None:
        """Let requests that wait for a stream notice that the pool is closed."""
        with self._lock:
            self._lock.notify_all()

    def close(self) -> None:
        """Write the states of all sessions to the store."""
        self._ended.set()
        with self._lock:
            for kept in list(self._kept.values()):
                self._wait_while_writing(*kept.key)
                if self._kept.get(kept.key) is kept:
                    self._store(kept, state=True)

    def _store(self, kept: KeptSession, *, state: bool = False) -> bool:
        """Write a session to the store, if there is one. Returns False if it is not in the journal, with or without its state."""
        stored = self._written(kept.store)
        if stored and (state or (kept.journal is not None and kept.journal.long)):
            kept.saved = self._written(kept.store_state)
        return stored

    def _written(self, write: Callable[[], None]) -> bool:
        """Write something to the store. Returns False if that fails."""
        try:
            write()
        except TakenOverError:  # it is not ours to write
            return True
        except ZooError as error:
            self._report(error)
            return False
        return True

    def _put_away(self, kept: KeptSession) -> bool:
        """Move a session that is marked as being written out of memory. Returns False if it cannot be stored.

        Without its state in the store, its tokens are read again.
        """
        with self._marked(kept.key):
            stored = self.store is None or self._store(kept, state=True)
            if stored:
                with suppress(ZooError):
                    kept.session.close()
                with self._lock:  # others iterate over the sessions
                    del self._kept[kept.key]
                release_freed()  # states of all sizes, freed in every thread, would fragment the heap more and more
        return stored

    @contextmanager
    def _marked(self, key: tuple[str, str]) -> Iterator[None]:
        """Let requests have the session, which is marked as being written, when the block ends."""
        try:
            yield
        finally:
            with self._lock:
                self._writing.discard(key)
                self._lock.notify_all()


def _check_new(name: str, wanted: bool | None, new: bool) -> None:
    """Raise ApiError unless the session is new, or not, as wanted."""
    if wanted and not new:
        raise ApiError(409, f"session: '{name}' already exists", "session", "session_exists")
    if wanted is False and new:
        raise missing(name)


def missing(name: str) -> ApiError:
    """Return the error about a session that does not exist."""
    return ApiError(404, f"session: '{name}' does not exist", "session", "session_not_found")


def _busy(name: str) -> ApiError:
    return ApiError(409, f"session: '{name}' is busy with another request", "session", "session_busy")
