"""``hicache doctor --engine``: do the engine, hicache and the sidecar go together, and which line starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hicache.cli import config, units
from hicache.cli.engine_probes import EngineFacts, ModelFacts, read_model
from hicache.cli.verdicts import Check, Verdict
from hicache.errors import ConfigError, HicacheError

if TYPE_CHECKING:
    from hicache.rpc.client import Client

ENGINES = ("vllm", "sglang", "transformers")

#: Versions that the adapters are written for and tested with.
TESTED = {"vllm": "0.32.", "sglang": "0.5.23", "transformers": "5."}

#: Tokens of one page where nothing says otherwise, and of one block of the engine.
_PAGE_TOKENS = {"vllm": 32, "sglang": 64, "transformers": 64}
_BLOCK_TOKENS = {"vllm": 16, "sglang": 64, "transformers": 64}

_DOCKER_SHM_BYTES = 64 << 20
_PROBE_BYTES = 64 << 10

#: What vLLM's KVTransferConfig has. It refuses others itself, but only once the engine starts.
_TRANSFER_KEYS = (
    "kv_connector",
    "engine_id",
    "kv_buffer_device",
    "kv_role",
    "kv_port",
    "kv_connector_extra_config",
    "kv_connector_module_path",
    "enable_permute_local_kv",
    "kv_load_failure_policy",
)

Connect: TypeAlias = "Callable[[str], Client]"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What was asked: the engine, its settings as text, its model. ``endpoint`` empty: the settings' own."""

    engine: str
    endpoint: str
    settings: str = ""
    block_tokens: int = 0
    ranks: int = 1


# --- packages


def judge_packages(facts: EngineFacts) -> list[Check]:
    """Whether the engine's packages and hicache's go together."""
    return [_version(facts), _together(facts), _adapter(facts), *_memory(facts)]


def _version(facts: EngineFacts) -> Check:
    tested = f"{TESTED[facts.engine]}x" if TESTED[facts.engine].endswith(".") else TESTED[facts.engine]
    if not facts.version:
        advice = f"install hicache where {facts.engine} is, and run the doctor with that interpreter"
        return Check(facts.engine, Verdict.CHANGE, "not installed in this interpreter", advice)
    found = f"{facts.distribution} {facts.version}"
    if facts.version.startswith(TESTED[facts.engine]):
        return Check(facts.engine, Verdict.FINE, found)
    if facts.engine == "vllm":
        advice = f'tested with {tested}: install that, or set "allow_other_versions": true and try'
        return Check(facts.engine, Verdict.CHANGE, found, advice)
    return Check(facts.engine, Verdict.ADVICE, found, f"tested with {tested}: run your own checks first")


def _together(facts: EngineFacts) -> Check:
    found = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    if facts.clashes:
        return Check(
            "packages", Verdict.CHANGE, "; ".join(facts.clashes), "install versions that both accept"
        )
    missing = [name for name in ("protobuf", "grpcio", "numpy") if name not in facts.versions]
    if missing:
        advice = "hicache needs them in this interpreter: pip install hicache, not its files alone"
        return Check("packages", Verdict.CHANGE, f"{', '.join(missing)} missing", advice)
    return Check("packages", Verdict.FINE, found)


def _adapter(facts: EngineFacts) -> Check:
    if facts.adapter.problem:
        advice = f"the adapter does not load beside this {facts.engine}: mend what is named"
        return Check("adapter", Verdict.CHANGE, facts.adapter.problem, advice)
    return Check("adapter", Verdict.FINE, f"{facts.adapter.found.get('module')} loads")


def _memory(facts: EngineFacts) -> list[Check]:
    if facts.engine == "transformers":
        return []
    checks = [Check("engine's memory", Verdict.FINE, "processes can map each other's memfds")]
    if facts.shared_memory_problem:
        advice = (
            "run sidecar, scheduler and workers as one user, in one PID namespace, without hidepid on /proc"
        )
        checks = [Check("engine's memory", Verdict.CHANGE, facts.shared_memory_problem, advice)]
    if 0 < facts.shm_bytes <= _DOCKER_SHM_BYTES:
        advice = f"{facts.engine}'s own processes talk through it: docker run --shm-size 8g, or --ipc host"
        found = units.human_size(facts.shm_bytes)
        checks.append(Check("engine's /dev/shm", Verdict.ADVICE, found, advice))
    return checks


# --- settings


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The engine's settings as they would take effect; ``checks`` tells what is wrong with the text."""

    endpoint: str
    page_tokens: int
    checks: list[Check]


def judge_settings(request: Request) -> Settings:
    """Check the JSON that the engine would be given, key by key."""
    block = request.block_tokens or _BLOCK_TOKENS[request.engine]
    try:
        if request.engine == "vllm":
            return _vllm_settings(request, block)
        if request.engine == "sglang":
            return _sglang_settings(request, block)
    except ConfigError as error:
        return Settings(request.endpoint, block, [Check("settings", Verdict.CHANGE, str(error))])
    return Settings(request.endpoint, request.block_tokens or _PAGE_TOKENS["transformers"], [])


def _vllm_settings(request: Request, block: int) -> Settings:
    from hicache.integrations.vllm import settings as vllm

    flag = "--kv-transfer-config"
    given = _object(request.settings, flag) if request.settings else vllm_config(request.endpoint)
    checks = _unknown_keys(given, flag)
    wanted = vllm_config(request.endpoint)
    for key in ("kv_connector", "kv_connector_module_path", "kv_role"):
        if given.get(key) != wanted[key]:
            found = f"{flag}: {key} is {given.get(key)!r}"
            checks.append(Check("settings", Verdict.CHANGE, found, f'set "{key}": "{wanted[key]}"'))
    policy = given.get("kv_load_failure_policy", "fail")
    if policy not in {"recompute", "fail"}:
        advice = 'set "kv_load_failure_policy": "recompute"'
        checks.append(Check("settings", Verdict.CHANGE, f"{flag}: kv_load_failure_policy {policy!r}", advice))
    elif policy == "fail":
        advice = 'requests whose pages are lost while they load end with an error; "recompute" computes them'
        checks.append(Check("settings", Verdict.ADVICE, f"{flag}: kv_load_failure_policy is fail", advice))
    extra = given.get("kv_connector_extra_config")
    try:
        if not isinstance(extra, Mapping):
            raise ConfigError(
                f"{flag}: kv_connector_extra_config is missing", hint="it says where the sidecar is"
            )
        settings = vllm.parse(extra)
        page_tokens = vllm.page_tokens(settings, block)
    except ConfigError as error:
        return Settings(request.endpoint, block, [*checks, Check("settings", Verdict.CHANGE, str(error))])
    blocks = page_tokens // block
    count = "1 block" if blocks == 1 else f"{blocks} blocks"
    found = f"pages of {page_tokens} tokens, {count} of {block}; save {settings.save.value}"
    return Settings(settings.endpoint, page_tokens, [*checks, Check("settings", Verdict.FINE, found)])


def _unknown_keys(given: Mapping[str, Any], flag: str) -> list[Check]:
    """One for each top-level key that vLLM does not have."""
    checks = []
    for key in sorted(given.keys() - set(_TRANSFER_KEYS)):
        near = difflib.get_close_matches(key, _TRANSFER_KEYS, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_TRANSFER_KEYS)}"
        checks.append(Check("settings", Verdict.CHANGE, f"{flag}: unknown key {key!r}", advice))
    return checks


def _sglang_settings(request: Request, block: int) -> Settings:
    from hicache.integrations.sglang import settings as sglang

    flag = "--hicache-storage-backend-extra-config"
    if request.settings.startswith("@"):
        advice = (
            "give the JSON itself: from a file SGLang takes the shm allocator too late, and pages are copied"
        )
        return Settings(
            request.endpoint, block, [Check("settings", Verdict.CHANGE, f"{flag} {request.settings}", advice)]
        )
    given = _object(request.settings, flag) if request.settings else sglang_config(request.endpoint)
    checks = []
    wanted = sglang_config(request.endpoint)
    for key in ("module_path", "class_name"):
        if given.get(key) != wanted[key]:
            checks.append(
                Check(
                    "settings",
                    Verdict.CHANGE,
                    f"{flag}: {key} is {given.get(key)!r}",
                    f'set "{key}": "{wanted[key]}"',
                )
            )
    for key in ("interface_v1", "allocator"):
        if given.get(key) != wanted[key]:
            advice = f'set "{key}": {json.dumps(wanted[key])}: without it each page is copied once more'
            checks.append(Check("settings", Verdict.ADVICE, f"{flag}: {key} is {given.get(key)!r}", advice))
    try:
        settings = sglang.read_settings(given)
    except ConfigError as error:
        return Settings(request.endpoint, block, [*checks, Check("settings", Verdict.CHANGE, str(error))])
    found = f"pages of {block} tokens (SGLang's --page-size)"
    return Settings(settings.endpoint, block, [*checks, Check("settings", Verdict.FINE, found)])


def _object(text: str, flag: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises ConfigError."""
    try:
        found = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag}: no JSON: {error}", hint="quote it for the shell: '{...}'") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{flag}: a JSON object is wanted, not {type(found).__name__}")
    return found


# --- sidecar and sizes


def judge_sidecar(client: Client, page_bytes: int) -> list[Check]:
    """Whether the sidecar answers, and pages travel through shared memory. Leaves nothing behind."""
    try:
        offered = client.connect()
        namespace = client.namespace(model="hicache doctor", page_tokens=1, page_bytes=page_bytes)
        with namespace.reserve([0], wait_ms=1000) as reservation:
            if reservation.missing_pages:
                reservation.write(reservation.present_pages, bytes(page_bytes))
            reservation.abort()
    except HicacheError as error:
        return [Check("sidecar", Verdict.CHANGE, f"a page of {units.human_size(page_bytes)}: {error}")]
    tiers = ", ".join(f"{tier.name} {units.human_size(tier.capacity_bytes)}" for tier in offered.tiers)
    checks = [Check("sidecar", Verdict.FINE, f"hicache {offered.server_version}: {tiers}")]
    readable = any(tier.client_readable for tier in offered.tiers)
    if offered.fd_socket and readable:
        found = f"a page of {units.human_size(page_bytes)} was written through shared memory, and taken back"
        return [*checks, Check("shared memory", Verdict.FINE, found)]
    advice = "engines read pages in place: use the sidecar's unix socket, on its own host, as its own user"
    return [*checks, Check("shared memory", Verdict.CHANGE, "this sidecar passes no memory", advice)]


def judge_sizes(
    model: ModelFacts, tiers: Mapping[str, int], page_tokens: int, request: Request
) -> list[Check]:
    """How large a page is, and how many tokens each tier holds."""
    each = page_bytes_of(model, page_tokens, request.ranks)
    found = f"{units.human_size(each)} for {page_tokens} tokens: {model.layers} layers, {model.kv_heads} KV heads of"
    checks = [Check("page", Verdict.FINE, f"{found} {model.head_size}, {model.dtype}")]
    if model.doubts:
        checks.append(_doubt(model, request.engine))
    for name, capacity_bytes in tiers.items():
        tokens = capacity_bytes // each * page_tokens
        found = f"{tokens:,} tokens in {units.human_size(capacity_bytes)}"
        verdict, advice = Verdict.FINE, ""
        if not tokens:
            verdict, advice = Verdict.CHANGE, "not one page fits: make the tier larger"
        elif tokens < model.max_tokens:
            verdict = Verdict.ADVICE
            advice = f"less than one prompt of the longest kind ({model.max_tokens:,} tokens): make it larger"
        checks.append(Check(f"room in {name}", verdict, found, advice))
    return checks


def page_bytes_of(model: ModelFacts, page_tokens: int, ranks: int) -> int:
    """Bytes of one page over all ranks: with more ranks than KV heads, each head is held several times."""
    return model.token_bytes * max(1, ranks // model.kv_heads) * page_tokens


def _doubt(model: ModelFacts, engine: str) -> Check:
    found = f"{'; '.join(model.doubts)}"
    advice = "the adapter says at start whether it can serve this model"
    if engine == "vllm" and "sliding windows" in model.doubts:
        advice = (
            "with a connector vLLM keeps all tokens of a window (no hybrid KV cache manager): plan the memory"
        )
    if "encoder-decoder" in model.doubts:
        return Check("model", Verdict.CHANGE, found, "no adapter serves it: its KV follows from no prefix")
    return Check("model", Verdict.ADVICE, found, advice)


# --- what to paste


def vllm_config(endpoint: str) -> dict[str, Any]:
    """The value of ``--kv-transfer-config``."""
    return {
        "kv_connector": "HiCacheConnector",
        "kv_connector_module_path": "hicache.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"endpoint": endpoint},
    }


def sglang_config(endpoint: str) -> dict[str, Any]:
    """The value of ``--hicache-storage-backend-extra-config``."""
    return {
        "backend_name": "hicache",
        "module_path": "hicache.integrations.sglang",
        "class_name": "HiCacheStorageBackend",
        "interface_v1": 1,
        "allocator": "shm",
        "endpoint": endpoint,
    }


def command(request: Request, endpoint: str, model: str) -> str:
    """What starts the engine with hicache, ready to paste."""
    name = shlex.quote(model or "MODEL")
    if request.engine == "vllm":
        value = request.settings if request.settings else json.dumps(vllm_config(endpoint))
        words = f"vllm serve {name}"
        words += f" --block-size {request.block_tokens}" if request.block_tokens else ""
        words += f" --tensor-parallel-size {request.ranks}" if request.ranks > 1 else ""
        return f"{words} --kv-transfer-config {shlex.quote(value)}"
    if request.engine == "sglang":
        value = request.settings if request.settings else json.dumps(sglang_config(endpoint))
        words = f"python -m sglang.launch_server --model-path {name} --page-size {request.block_tokens or 64}"
        words += f" --tp-size {request.ranks}" if request.ranks > 1 else ""
        words += " --enable-hierarchical-cache --hicache-mem-layout page_first --hicache-write-policy write_through"
        words += " --hicache-storage-backend dynamic"
        return f"{words} --hicache-storage-backend-extra-config {shlex.quote(value)}"
    return f"prefixes = PrefixStore(hicache.Client({endpoint!r}), model)  # then prefixes.generate(...)"


# --- all of it


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The checks, and the line that starts the engine."""

    checks: list[Check]
    command: str


def examine(request: Request, facts: EngineFacts, connect: Connect, model: str, kv_dtype: str) -> Report:
    """Everything about one engine. ``connect(endpoint)`` makes a client. Raises ConfigError for a bad ``--model``."""
    figures = read_model(model, kv_dtype) if model else None
    settings = judge_settings(request)
    checks = [*judge_packages(facts), *settings.checks]
    page_bytes = _PROBE_BYTES
    if figures is not None:
        page_bytes = page_bytes_of(figures, settings.page_tokens, request.ranks)
    tiers: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(connect(settings.endpoint))
            checks += judge_sidecar(client, page_bytes)
            tiers = {tier.name: tier.capacity_bytes for tier in client.connect().tiers}
        except HicacheError as error:
            checks.append(Check("sidecar", Verdict.CHANGE, str(error), _start_it(settings.endpoint)))
        except ImportError as error:
            checks.append(Check("sidecar", Verdict.CHANGE, f"hicache's client does not load: {error}"))
    if figures is not None:
        checks += judge_sizes(figures, tiers, settings.page_tokens, request)
    if any(check.verdict is Verdict.CHANGE for check in settings.checks):
        request = dataclasses.replace(request, settings="")  # the line to paste is a right one
    return Report(checks, command(request, _local(settings.endpoint), model))


def _start_it(endpoint: str) -> str:
    """What starts the sidecar that is meant."""
    path = _local(endpoint).removeprefix("unix:").removeprefix("//")
    return f"start it: hicache serve --socket-path {shlex.quote(path)}"


def _local(endpoint: str) -> str:
    """The endpoint, or, of one that is no unix socket, the usual one."""
    return endpoint if endpoint.startswith(("unix:", "/")) else f"unix://{config.default_socket_path()}"
