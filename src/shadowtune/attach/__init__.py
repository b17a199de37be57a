"""Attach a shadow to an existing transformers model, and detach it without a trace."""

import transformers.models.auto.modeling_auto  # noqa: F401 - first, since it registers our classes (registration.py)

from shadowtune.attach.architectures import ARCHITECTURES, Architecture, architecture_of
from shadowtune.attach.attachment import Attachment, attach

__all__ = ["ARCHITECTURES", "Architecture", "Attachment", "architecture_of", "attach"]
