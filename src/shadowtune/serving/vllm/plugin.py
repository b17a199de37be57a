"""The entry point ``vllm.general_plugins``, which vLLM calls in each of its processes."""

import logging
from importlib import metadata

import vllm
from packaging.version import Version
from vllm import ModelRegistry

from shadowtune.serving.vllm.support import TESTED_VLLM

MODELS = {
    "ShadowForCausalLM": "shadowtune.serving.vllm.model:AttachedForCausalLM",
    "ShadowForSequenceClassification": "shadowtune.serving.vllm.model:AttachedForSequenceClassification",
}
"""``architectures`` of a saved shadow's config.json -> vLLM's model of it, which is imported when it is needed."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the models of shadows with vLLM. Idempotent, as vLLM may call it more than once.

    Importing this package has registered their config with transformers.
    """
    if not TESTED_VLLM.contains(Version(vllm.__version__).base_version):
        logger.warning(
            "shadowtune %s was tested with vLLM %s, not with the installed %s; compare answers with those of "
            "shadowtune generate before you rely on it",
            metadata.version("shadowtune"),
            TESTED_VLLM,
            vllm.__version__,
        )
    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)
