"""The namespace of a model: everything that must be equal for its KV to be reusable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from hicache.errors import InvalidArgumentError
from hicache.integrations.configs import config_digest
from hicache.integrations.transformers.pages import PageShape
from hicache.rpc.client.arguments import NamespaceFields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: How pages are laid out. Another layout of ours, or of transformers' caches, gets another name.
LAYOUT = "transformers.DynamicCache/1 [layers,2,tokens,heads,dim]"


def namespace_fields(
    model: PreTrainedModel,
    shape: PageShape,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    salt: str = "",
) -> NamespaceFields:
    """The fields of the model's namespace, all but the tenant.

    The model's name is not among them where a digest of the weights stands for it: a copy elsewhere is the same
    model. With ``revision`` the name is, and the weights are not read.
    Raises InvalidArgumentError where neither can be had.
    """
    config: Any = model.config
    name = str(getattr(config, "name_or_path", "") or "")
    active = active_adapters(model)
    if revision is not None:
        if not revision or not name:
            raise InvalidArgumentError(
                "a revision says nothing without a model's name",
                hint="load the model with from_pretrained, or leave revision out: the weights are digested then",
            )
        if active and not adapter:
            raise InvalidArgumentError(
                f"adapters {active} are active, and a revision does not tell their weights",
                hint="give adapter= a name that changes with them, or leave revision out",
            )
    weights = f"sha256:{weights_digest(model)}" if revision is None else revision
    return NamespaceFields(
        model=str(config.model_type) if revision is None else name,
        revision=f"{weights} config:{config_digest(config.to_dict())}",
        adapter=" ".join(part for part in (adapter, f"active:{active}" if active else "") if part),
        salt=salt,
        kv_dtype=str(shape.dtype).removeprefix("torch."),
        layout=LAYOUT,
        engine_version=f"transformers {transformers.__version__} {config._attn_implementation}",
        layers=shape.layers,
        kv_heads=shape.heads,
        head_size=shape.dim,
        page_tokens=shape.page_tokens,
        page_bytes=shape.page_bytes,
    )


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over all weights and their names; seconds for large models. Raises InvalidArgumentError."""
    weights = sorted(model.state_dict().items())
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        digests = list(pool.map(_tensor_digest, weights))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _tensor_digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    try:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (AttributeError, RuntimeError, TypeError) as error:
        raise InvalidArgumentError(
            f"the weights of {name} cannot be digested: {error}",
            hint="give revision= a name that changes with the weights",
        ) from error
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
    digest.update(data.data)
    return digest.digest()


def active_adapters(model: torch.nn.Module) -> str:
    """The names of the adapters (PEFT) that are at work in the model now; empty where there are none."""
    if not getattr(model, "peft_config", None):
        return ""
    modules: Iterable[Any] = model.modules()
    layers = [layer for layer in modules if isinstance(getattr(layer, "disable_adapters", None), bool)]
    at_work = {"+".join(layer.active_adapters) for layer in layers if not layer.disable_adapters}
    return ",".join(sorted(at_work))
