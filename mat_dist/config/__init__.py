"""Configuration: YAML files, `key=value` overrides, presets, all errors at once."""

from mat_dist.config.help import Options, TrainingOptions, count, schema_json
from mat_dist.config.load import (
    binding,
    config_differences,
    config_folders,
    config_name,
    dump_config,
    flat_settings,
    load_config,
    recipe_notes,
    resume_conflicts,
    trains_longer,
    with_absolute_paths,
)
from mat_dist.config.plugins import load_plugins, other_plugins
from mat_dist.config.rules import config_warnings
from mat_dist.config.schema import Config, DataConfig, ModelConfig, PeerConfig, RunConfig

__all__ = [
    "Config", "DataConfig", "ModelConfig", "Options", "PeerConfig", "RunConfig", "TrainingOptions", "binding",
    "config_differences", "config_folders", "config_name", "config_warnings", "count", "dump_config", "flat_settings",
    "load_config", "load_plugins", "other_plugins", "recipe_notes", "resume_conflicts", "schema_json", "trains_longer",
    "with_absolute_paths",
]
