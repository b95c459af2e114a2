"""The log of the service: lines of JSON on the standard error, without features or keys."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("cdc_mmpg.cloud")


class JSONFormatter(logging.Formatter):
    """Formatter that writes a record as a line of JSON: time, level, event and fields; never a feature or a key."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
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
    """Write a line of the log."""
    logger.info(event, extra={"fields": fields})


def configure_logs() -> None:
    """Write all logs of this process as lines of JSON to the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every odd request, which we count
