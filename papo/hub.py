"""The Hugging Face hub: whether it answers, asked once, where its libraries would ask for long."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

from papo.errors import PapoError, first_line, shown

_SECONDS = 3.0


def check_model(name: str) -> Path | None:
    """Refuse a model that is neither in the cache nor to be had.

    Args:
        name: its hub id.

    Returns:
        The cached folder, where only that can be used; the libraries then stay offline.

    Raises:
        PapoError: it is no hub id; or the hub does not answer, and the cache lacks the model.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError as error:
        raise PapoError(
            f"model.path={shown(name)}: neither a folder nor a hub id: {first_line(error)}"
        ) from error
    fault = hub_fault(f"{name}/resolve/main/config.json")
    if fault is None:
        return None
    if not isinstance(config, str):
        raise _refused("model.path", name, fault)
    _stay_offline()
    return Path(config).parent


def check_dataset(name: str) -> None:
    """Refuse a dataset that is neither in a cache nor to be had; with the cache alone, the
    libraries stay offline.

    Args:
        name: its hub id.

    Raises:
        PapoError: the hub does not answer, and the caches lack the dataset.
    """
    from huggingface_hub import constants

    fault = hub_fault()
    if fault is None:
        return
    made = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
    caches = (
        Path(made, name.replace("/", "___")),
        Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"),
    )
    if not any(folder.is_dir() for folder in caches):
        raise _refused("data.dataset", name, fault)
    _stay_offline()


@functools.cache
def hub_fault(file: str = "") -> str | None:
    """Why the hub cannot be asked, None if it answers; asked for 3 seconds, once for a file.

    Proxies, HF_ENDPOINT and HF_HUB_OFFLINE act as in the hub's own library.

    Args:
        file: must be there, or need a login.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    fault = [f"cannot be reached: no answer within {_SECONDS:g} s"]

    def ask() -> None:
        try:
            url = f"{constants.ENDPOINT}/{file}"
            status = get_session().head(url, timeout=_SECONDS).status_code
            # A mirror may have no page at its own address.
            lacks = status >= 500 or (file and status in (400, 404, 410))
            fault[0] = f"answers HTTP {status}" if lacks else ""
        except Exception as error:  # of the network, of a proxy's address, and so on
            fault[0] = f"cannot be reached: {first_line(error)}"

    # The time limit of a request does not cover the search for the host's address.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return f"{constants.ENDPOINT} {fault[0]}" if fault[0] else None


def _refused(option: str, name: str, fault: str) -> PapoError:
    return PapoError(
        f"{option}={shown(name)}: no such folder, not in the hub's cache, and {fault}; "
        "expected a folder, or the hub within reach"
    )


def _stay_offline() -> None:
    """Keep the hub's libraries from trying: they read the variable when they are imported."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
