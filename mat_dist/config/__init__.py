"""Configuration: YAML files, `key=value` overrides, presets, all errors at once."""

from mat_dist.config.cli import Arguments, help_text, parse_command_line
from mat_dist.config.compare import config_differences, dump_config, resume_conflicts, trains_longer
from mat_dist.config.json_schema import schema_json
from mat_dist.config.load import config_folders, config_name, load_config
from mat_dist.config.plugins import load_plugins
from mat_dist.config.rules import config_warnings
from mat_dist.config.schema import (
    AttackConfig,
    AugmentConfig,
    CheckpointConfig,
    CommConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PeerConfig,
    RunConfig,
    StepConfig,
    ThreatConfig,
    TrainConfig,
)

__all__ = [
    "Arguments", "AttackConfig", "AugmentConfig", "CheckpointConfig", "CommConfig", "Config", "DataConfig",
    "EvalConfig", "LogConfig", "LossConfig", "ModelConfig", "OptimConfig", "PeerConfig", "RunConfig", "StepConfig",
    "ThreatConfig", "TrainConfig", "config_differences", "config_folders", "config_name", "config_warnings",
    "dump_config", "help_text", "load_config", "load_plugins", "parse_command_line",
    "resume_conflicts", "schema_json", "trains_longer",
]
