"""Log of the service: JSON lines on stderr, without features or keys."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("cdc_mmpg.cloud")


class JSONFormatter(logging.Formatter):
    """Formatter that writes a record as a line of JSON: time, level, event and fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as a line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "process": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_event(event: str, **fields: Any) -> None:
    """Log an event with its fields."""
    logger.info(event, extra={"fields": fields})


def configure_logs() -> None:
    """Send all logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # hides malformed requests, which are counted
