"""Models the trainer's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, converted once into the user's cache."""
    from papo.model.files import resolve_model_path

    return Path(resolve_model_path("smollm2-135m"))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with tied embeddings, a character tokenizer and a chat template."""
    from tests.trainer.tiny import build_model

    return build_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_untied_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    from tests.trainer.tiny import build_model

    return build_model(tmp_path_factory.mktemp("tiny-untied"), tied=False)
