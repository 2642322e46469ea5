"""A line of a person's file as JSON, or the reason why it is none, in words that name the line."""

from __future__ import annotations

import json
from typing import Any

from sglp_deploy.errors import ConfigError


def value_of(line: str, place: str) -> Any:
    """What ``line`` holds.

    Args:
        line: One JSON document.
        place: "FILE line 3", with which an error begins.

    Raises:
        ConfigError: If it is not JSON, cannot be read, or holds a text that is none.
    """
    try:
        value = json.loads(line)
        # JSON may escape half of a surrogate pair alone; no tokenizer takes such a text.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not JSON; {error.msg}; one JSON object a line is read") from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place} holds half a surrogate pair; no tokenizer reads it; mend the text") from error
    except RecursionError as error:
        raise ConfigError(f"{place} is nested too deeply; one flat object a line is read; change it") from error
    except ValueError as error:
        raise ConfigError(f"{place} holds a number that is too long; no item needs it; change it") from error
    return value
