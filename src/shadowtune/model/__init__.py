"""The attached model as a transformers model, its files, and the training methods it is compared with."""

import transformers.models.auto.modeling_auto  # noqa: F401 - first, since it registers our classes (registration.py)
