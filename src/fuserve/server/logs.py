"""Structured logs: one JSON object a line, on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("fuserve.server")
_FIELDS = "fuserve_fields"


class JsonFormatter(logging.Formatter):
    """Time, level, event, and the fields given to ``log_event``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def log_event(level: int, event: str, *, error: BaseException | None = None, **fields: Any) -> None:
    """Log an event; fields that are None are left out."""
    if LOGGER.isEnabledFor(level):
        present = {name: value for name, value in fields.items() if value is not None}
        LOGGER.log(level, event, exc_info=error, extra={_FIELDS: present})


def configure_logging(level: str = "info") -> None:
    """Send the logs of fuserve and uvicorn to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("fuserve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper() if name == "fuserve" else logging.WARNING)
