"""shadowtune: adapt a large language model once, deploy it twice.

Importing this package registers the model type ``shadow`` with transformers and does nothing else.
"""

from shadowtune.quiet import quiet_imports

with quiet_imports():
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from shadowtune.attach import attach
    from shadowtune.compatibility import warn_of_untested_versions
    from shadowtune.config.shadow import ShadowConfig
    from shadowtune.model.causal_lm import ShadowForCausalLM
    from shadowtune.model.classifier import ShadowForSequenceClassification
    from shadowtune.model.configuration import ShadowModelConfig

warn_of_untested_versions()
AutoConfig.register("shadow", ShadowModelConfig, exist_ok=True)
AutoModelForCausalLM.register(ShadowModelConfig, ShadowForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(ShadowModelConfig, ShadowForSequenceClassification, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "ShadowConfig",
    "ShadowForCausalLM",
    "ShadowForSequenceClassification",
    "ShadowModelConfig",
    "__version__",
    "attach",
]
