"""Configuration: YAML files, `key=value` overrides, presets, all errors at once."""
