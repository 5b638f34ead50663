"""One parser for all scripts: typed dataclasses, YAML recipes, `--section.field value` overrides."""


class ConfigError(ValueError):
    """A user's mistake in a setting. The message names the field, the value, and what to do."""
