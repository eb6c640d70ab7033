"""Engines as threads of this process, with a scripted engine: for tests of whole flows and for the simulator.

Nothing computes here. A scripted engine generates one token a step for each request it holds, at once or in the time
that its script says, and dies, stalls or fails where its script says so. Not a backend that a job can name, unless a
test registers it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from batchllm_operators.execute.backends.base import Death, Place
from batchllm_operators.execute.engine import Engine, EngineLimits, Request
from batchllm_operators.execute.messages import Event, Load, Run, Shutdown
from batchllm_operators.execute.worker import EngineLoop, EngineMaker
from batchllm_operators.records import EngineSetting
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Answer
from batchllm_operators.tasks.generate import ENDED_BY_LENGTH

KILLED = Death.by_exit_code(-9)
JOIN_SECONDS = 10.0


class EngineKilledError(BaseException):
    """The engine is gone from one moment to the next; not an `Exception`, because nobody may go on after it."""


@dataclass(frozen=True)
class Script:
    """What a scripted engine does; token ids are looked for anywhere in a prompt."""

    capacity: int = 4
    """Requests it holds."""
    step_seconds: float = 0.0
    poison: int | None = None
    """A token id on which the engine is killed."""
    stuck: int | None = None
    """A token id on which it steps for ever without computing."""
    load_seconds: float = 0.0
    load_fault: Exception | None = None
    """What loading fails with."""
    killed_while_loading: bool = False
    answer: Callable[[Request], str] = lambda _request: "text"
    """The text of an answer."""
    on_submit: Callable[[Request], None] = lambda _request: None
    """Called with each request that the engine takes."""


class ScriptedEngine:
    """An engine without a model.

    Args:
        script: what it does.
        load: the command that asked for it.
        die: ends the engine at once; does not return.
    """

    def __init__(self, script: Script, load: Load, die: Callable[[], None]) -> None:
        self._script = script
        self._die = die
        self._held: list[Request] = []
        self._generated: dict[bytes, int] = {}
        self.computed_tokens = 0
        reason = load.attention_reason or "the job"
        self.settings = (EngineSetting(name="attention", value=load.model.attention, reason=reason),)
        self.limits = EngineLimits("1 x nothing", 5000, 100_000, script.capacity, 4096, 2048)

    @property
    def capacity(self) -> int:
        """The capacity that the script says."""
        return self._script.capacity

    @property
    def unfinished(self) -> int:
        """Requests it holds."""
        return len(self._held)

    def submit(self, request: Request) -> Answer | None:
        """Take a request; none is refused."""
        self._script.on_submit(request)
        self._held.append(request)
        return None

    def step(self) -> list[Answer]:
        """Generate one token for each request, unless the script says otherwise."""
        time.sleep(self._script.step_seconds)
        if self._holds(self._script.poison):
            self._die()
        if self._holds(self._script.stuck):
            return []
        finished = []
        for request in list(self._held):
            tokens = self._generated[request.key] = self._generated.get(request.key, 0) + 1
            self.computed_tokens += 1
            if tokens >= request.sampling.max_tokens:
                self._held.remove(request)
                del self._generated[request.key]
                finished.append(self._answer(request, tokens))
        return finished

    def abort(self, keys: Collection[bytes]) -> None:
        """Forget requests."""
        self._held = [request for request in self._held if request.key not in keys]
        for key in keys:
            self._generated.pop(key, None)

    def close(self) -> None:
        """Nothing to free."""

    def _holds(self, token: int | None) -> bool:
        return token is not None and any(token in request.prompt_token_ids for request in self._held)

    def _answer(self, request: Request, tokens: int) -> Answer:
        return Answer(
            request.key,
            ([1] * tokens, self._script.answer(request), ENDED_BY_LENGTH),
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=0,
            completion_tokens=tokens,
        )


def _die_in_thread() -> None:
    raise EngineKilledError


@dataclass(frozen=True)
class ScriptedMaker:
    """Makes scripted engines, see `EngineMaker`."""

    script: Script
    die: Callable[[], None] = _die_in_thread
    """Ends the engine at once; does not return."""

    def prepare(self) -> None:
        """Nothing to import."""

    def load(self, command: Load) -> ScriptedEngine:
        """Take the time, or the end, that the script says."""
        time.sleep(self.script.load_seconds)
        if self.script.killed_while_loading:
            self.die()
        if self.script.load_fault is not None:
            raise self.script.load_fault
        return ScriptedEngine(self.script, command, self.die)


class InlineBackend:
    """Engines in threads of this process.

    Args:
        engines: how many.
        maker: makes the engine of a place; called for each start, so that a new engine may behave otherwise.
    """

    def __init__(self, engines: int, maker: Callable[[Place], EngineMaker]) -> None:
        self._places = tuple(Place(index=index) for index in range(engines))
        self._maker = maker
        self.links: list[InlineLink] = []
        """All that were started, in their order."""

    def places(self) -> Sequence[Place]:
        """The places, one for each engine."""
        return self._places

    def start(self, place: Place) -> InlineLink:
        """Start a thread."""
        self.links.append(InlineLink(place, self._maker(place)))
        return self.links[-1]

    def keep_logs(self, _work: Store) -> list[str]:
        """Threads have no logs of their own."""
        return []

    def close(self) -> None:
        """Nothing to free."""


@dataclass(slots=True)
class _Life:
    """Whether the engine of a link lives."""

    killed: threading.Event = field(default_factory=threading.Event)
    """Set from outside: the engine may compute and tell nothing more."""
    ended: threading.Event = field(default_factory=threading.Event)
    death: Death | None = None

    def end(self, death: Death) -> None:
        """Note the end; the first counts."""
        self.death = self.death or death
        self.ended.set()

    def require(self) -> None:
        """Go on only where nobody has killed the engine."""
        if self.killed.is_set():
            raise EngineKilledError


class InlineLink:
    """The link to an engine in a thread."""

    log = ""

    def __init__(self, place: Place, maker: EngineMaker) -> None:
        self.place = place
        self._life = _Life()
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._loop = EngineLoop(self._tell, _MortalMaker(maker, self._life), on_abandon=self._abandon)
        self._thread = threading.Thread(target=self._serve, name=f"{place.name} inline", daemon=True)
        self._thread.start()

    def send(self, command: Load | Run | Shutdown) -> None:
        """Give the loop a command."""
        self._loop.take(command)

    def receive(self, timeout_s: float) -> Event | None:
        """The next event of the thread."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if event is None:
            self._events.put(None)
            raise EOFError
        return event

    def death(self, wait_s: float = 0.0) -> Death | None:
        """How the thread has ended."""
        self._life.ended.wait(wait_s)
        return self._life.death

    def silence(self) -> str:
        """A thread tells nothing of itself."""
        return ""

    def kill(self) -> None:
        """Let the engine compute and tell nothing more; the thread ends with its next step."""
        self._life.killed.set()
        self._loop.stop()
        self._life.ended.wait(JOIN_SECONDS)
        self._life.end(KILLED)

    def close(self) -> None:
        """Nothing to free."""

    def _tell(self, event: Event) -> None:
        if self._life.killed.is_set():
            raise BrokenPipeError("the engine was killed")
        self._events.put(event)

    def _abandon(self) -> None:
        """Count the thread as ended where it loads, which cannot be interrupted; it ends by itself afterwards."""
        self._life.killed.set()
        self._end(KILLED)

    def _end(self, death: Death) -> None:
        self._life.end(death)
        self._events.put(None)

    def _serve(self) -> None:
        death = Death.by_exit_code(0)
        try:
            self._loop.serve()
        except EngineKilledError:
            death = KILLED
        except Exception as error:
            death = Death(f"exit code 1: {type(error).__name__}: {error}", 1)
        finally:
            self._end(death)


@dataclass(frozen=True)
class _MortalMaker:
    """Makes engines that go on only as long as nobody has killed them."""

    maker: EngineMaker
    life: _Life

    def prepare(self) -> None:
        self.maker.prepare()

    def load(self, command: Load) -> Engine:
        engine = self.maker.load(command)
        self.life.require()
        return _Mortal(engine, self.life)


@dataclass(frozen=True)
class _Mortal:
    """An engine of this process that can be killed from outside, as a process can: before its next step."""

    engine: Engine
    life: _Life

    @property
    def limits(self) -> EngineLimits:
        return self.engine.limits

    @property
    def settings(self) -> tuple[EngineSetting, ...]:
        return self.engine.settings

    @property
    def capacity(self) -> int:
        return self.engine.capacity

    @property
    def unfinished(self) -> int:
        self.life.require()
        return self.engine.unfinished

    @property
    def computed_tokens(self) -> int:
        return self.engine.computed_tokens

    def submit(self, request: Request) -> Answer | None:
        return self.engine.submit(request)

    def step(self) -> list[Answer]:
        self.life.require()
        finished = self.engine.step()
        self.life.require()
        return finished

    def abort(self, keys: Collection[bytes]) -> None:
        self.life.require()
        self.engine.abort(keys)

    def close(self) -> None:
        self.engine.close()
