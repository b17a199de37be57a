"""Storey 2: put a shadow beside somebody else's model, and take it away without a trace."""

from shadowtune.attach.architectures import ARCHITECTURES, Architecture, architecture_of
from shadowtune.attach.attachment import Attachment, attach

__all__ = ["ARCHITECTURES", "Architecture", "Attachment", "architecture_of", "attach"]
