"""What an engine may take on at once."""

from dataclasses import dataclass, field

from shadowtune.config.checking import check_range
from shadowtune.config.speculation import SpeculationConfig


@dataclass(frozen=True)
class Limits:
    """Settings of an ``Engine``.

    Raises:
        ConfigError: if a value is out of its range.
    """

    max_rows: int = 16
    """Requests that are answered at once."""
    max_queue: int = 64
    """Requests that wait beside them; one more is refused (429)."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together; None takes what the model has positions for."""
    max_tokens: int | None = None
    """Tokens that the cache may hold: rows times the longest of them, as far as its answer may go. None sets no bound
    but rows and length."""
    prefill_tokens: int = 512
    """Tokens of prompts that are read between two tokens of the answers that run."""
    speculation: SpeculationConfig | None = field(default_factory=SpeculationConfig)
    """How shadows draft; None never drafts."""
    reserve: int = 1
    """Requests that are answered beside ``max_rows`` if one owner holds all of these: of owners that hold none, so that
    nobody waits for another client's long answers."""
    close_seconds: float = 30.0
    """How long answers that run may go on after the engine was told to close."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        one = (1, None)
        check_range(self, max_rows=one, max_model_len=one, max_tokens=one, prefill_tokens=one)
        check_range(self, max_queue=(0, None), reserve=(0, None), close_seconds=(0, None))
