r"""One request as the scheduler side knows it: who may read and write what for it, and how far its pages are.

    unasked --ask--> asked --answer--> answered --offer taken--> (its load is under way: see scheduler.Load)
       ^               |  \--time is over, sidecar lost--> unasked, and not asked again where it took too long
       \---- preempted, or the lease was lost ------/

``ordered_pages`` is how many pages, from the first, the sidecar holds or is about to be given: where a look-up found
pages it starts there, a save order moves it on, and what came to nothing moves it back.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hicache.rpc.client import LeaseTicket
    from hicache.rpc.client.aio_held import Lease

TOKEN_BYTES = 4
#: Width of the digest of a page's images and the like; only in namespaces of multimodal models.
EXTRA_KEY_BYTES = 16
#: How often a request's lease may get lost before it is computed without one.
ASKS_MOST = 3
#: How often pages of one request may turn out to be gone again before it stops to store.
SETBACKS_MOST = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How the engine's blocks make pages. ``page_bytes`` covers all ``world`` ranks."""

    block_size: int
    page_tokens: int
    page_bytes: int
    world: int = 1
    extra_key_bytes: int = 0

    @property
    def page_blocks(self) -> int:
        """Blocks of a page."""
        return self.page_tokens // self.block_size


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, as a request names it. ``changing``: it may be another under the same name at any time."""

    name: str
    path: str
    number: int
    changing: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """What sets a request's namespace apart from the model's own."""

    adapter: Adapter | None = None
    salt: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the sidecar holds of a prompt. ``lease`` None: it was not asked, or did not answer."""

    lease: Lease | None = None
    granted_pages: int = 0
    matched_pages: int = 0
    slow_pages: int = 0  # of the granted ones, brought up from a slower tier


class Question:
    """A look-up on its way. Written by the agent, read by the scheduler; exactly one of them ends up with the lease."""

    __slots__ = ("_abandoned", "_answer", "_lock", "asked_ns", "extra_keys", "identity", "tokens")

    def __init__(
        self, identity: Identity, tokens: bytes, extra_keys: Sequence[bytes] | None, asked_ns: int
    ) -> None:
        self.identity = identity
        self.tokens = tokens
        self.extra_keys = extra_keys
        self.asked_ns = asked_ns
        self._lock = threading.Lock()
        self._answer: Answer | None = None
        self._abandoned = False

    @property
    def answer(self) -> Answer | None:
        """None while the sidecar has not answered."""
        return self._answer

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the answer."""
        return self._abandoned

    def settle(self, answer: Answer) -> bool:
        """The agent has an answer. False: nobody waits for it, and the lease is the agent's to release."""
        with self._lock:
            if not self._abandoned and self._answer is None:
                self._answer = answer
                return True
            return False

    def abandon(self) -> Answer | None:
        """The scheduler waits no longer. What was answered meanwhile is the scheduler's to release."""
        with self._lock:
            self._abandoned = True
            return self._answer


@dataclasses.dataclass(slots=True, eq=False)
class RequestState:
    """What is known of one request of the engine."""

    request: Any  # vLLM's own, only read
    identity: Identity
    page_tokens: int
    reads: bool
    writes: bool
    preemptions: int = 0
    outdated: bool = False  # computed before a reset: not to be stored
    extra_keys: list[bytes] | None = None
    question: Question | None = None
    answer: Answer | None = None
    parked: bool = False  # waits for its turn to ask
    asks: int = 0
    wait_since_ns: int = 0  # when the scheduler was first told to ask later; 0: it was not
    offered_tokens: int = 0  # end of what the last offer covers
    offered_from: int = 0
    ticket: LeaseTicket | None = None  # for what is offered
    ordered_pages: int = 0
    lost_pages: int = 0  # complete, but there was no staging memory for them
    jobs: int = 0  # saves that are not settled
    setbacks: int = 0
    quiet_until_ns: int = 0  # nothing is stored before
    tokens: bytearray = dataclasses.field(default_factory=bytearray)

    @property
    def request_id(self) -> str:
        """The id that vLLM gave it."""
        return str(self.request.request_id)

    @property
    def pending(self) -> bool:
        """Whether an answer is awaited."""
        return self.question is not None or self.parked

    def packed(self, known: Sequence[int], pages: int) -> bytes:
        """The ids of the first ``pages`` pages as little-endian int32; only ids not seen before are packed."""
        end = pages * self.page_tokens
        have = len(self.tokens) // TOKEN_BYTES
        if have < end:
            more = array.array("i", known[have:end])
            if sys.byteorder == "big":
                more.byteswap()
            self.tokens += more.tobytes()
        return bytes(memoryview(self.tokens)[: end * TOKEN_BYTES])

    def keys(self, pages: int) -> list[bytes] | None:
        """The extra keys of the first ``pages`` pages; None where the namespace has none."""
        if self.extra_keys is None:
            return None
        return self.extra_keys[:pages] + [b""] * (pages - len(self.extra_keys))

    def offerable_tokens(self, known_tokens: int) -> int:
        """Tokens of whole granted pages, never the request's last token."""
        if self.answer is None:
            return 0
        return min(self.answer.granted_pages, (known_tokens - 1) // self.page_tokens) * self.page_tokens

    def known(self, matched_pages: int) -> None:
        """The sidecar holds so many pages; it may not have counted those that are on their way to it."""
        self.ordered_pages = max(self.ordered_pages, matched_pages) if self.jobs else matched_pages

    def set_back(self, pages: int) -> None:
        """Only ``pages`` pages are in the sidecar, or on their way to it."""
        self.ordered_pages = min(self.ordered_pages, pages)


def new_state(request: Any, page_tokens: int, extra_key_bytes: int) -> RequestState:
    """The state of a vLLM request that nothing was done for yet."""
    reads, writes = _wishes(request)
    features = list(getattr(request, "mm_features", None) or ())
    if _uncacheable(request) or (features and not extra_key_bytes):
        reads = writes = False
    return RequestState(
        request=request,
        identity=identity_of(request),
        page_tokens=page_tokens,
        reads=reads and not getattr(request, "skip_reading_prefix_cache", False),
        writes=writes,
        preemptions=request.num_preemptions,
        extra_keys=extra_keys(features, page_tokens) if extra_key_bytes else None,
    )


def _uncacheable(request: Any) -> bool:
    """Prompts given as embeddings have no ids to go by; a session's prompt is rewritten while it runs."""
    if getattr(request, "prompt_embeds", None) is not None or request.prompt_token_ids is None:
        return True
    return bool(getattr(request, "resumable", False))


def _wishes(request: Any) -> tuple[bool, bool]:
    """Whether the request's ``kv_transfer_params`` want its pages loaded, and stored: {"hicache": "off"} and so on."""
    params = getattr(request, "kv_transfer_params", None)
    wish = params.get("hicache") if isinstance(params, dict) else None
    return wish not in {"off", "save"}, wish not in {"off", "load"}


def identity_of(request: Any) -> Identity:
    """The adapter and salt of a request."""
    lora = getattr(request, "lora_request", None)
    adapter = None
    if lora is not None:
        adapter = Adapter(
            lora.lora_name, lora.lora_path, lora.lora_int_id, bool(getattr(lora, "load_inplace", False))
        )
    return Identity(adapter, getattr(request, "cache_salt", None) or "")


def extra_keys(features: Sequence[Any], page_tokens: int) -> list[bytes]:
    """For each page up to the last that holds placeholders: a digest of what these stand for, empty for none.

    What lies before a page is in the chain of keys before it, so its own images and where they lie in it suffice.
    """
    pages: dict[int, list[tuple[int, int, str]]] = {}
    for feature in features:
        place = feature.mm_position
        for page in range(place.offset // page_tokens, -(-(place.offset + place.length) // page_tokens)):
            pages.setdefault(page, []).append(
                (
                    place.offset - page * page_tokens,
                    place.length,
                    feature.identifier,
                )
            )
    found = [b""] * (max(pages, default=-1) + 1)
    for page, items in pages.items():
        text = "\0".join(f"{at} {length} {identifier}" for at, length, identifier in sorted(items))
        found[page] = hashlib.blake2b(text.encode(), digest_size=EXTRA_KEY_BYTES).digest()
    return found


def complete_pages(computed_tokens: int, known_tokens: int, page_tokens: int) -> int:
    """Whole pages whose keys and values are right: computed (drafts not counted), of tokens that are known.

    With asynchronous scheduling the engine counts tokens as computed before it knows which they are.
    """
    return max(0, min(computed_tokens, known_tokens)) // page_tokens
