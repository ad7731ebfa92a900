"""The configuration of a run: frozen records, their defaults and checks, and ConfigDicts for config files."""

# isort: off
from cft_jax.config.load import config_name, config_of, load_config, nested_overrides
from cft_jax.config.records import broken_rules, read_override
from cft_jax.config.run import (
    RECORD, ChatConfig, CheckpointConfig, Config, DataConfig, ExportConfig, KeepConfig, LogConfig, LoraConfig,
    MeshConfig, ModelSettings, ScratchConfig, TrainConfig, changed, default_config_dict, eval_config_dict,
    from_config_dict,
    paper_config_dict, profile_window, read_config, validate,
)  # fmt: skip

__all__ = [
    "RECORD", "ChatConfig", "CheckpointConfig", "Config", "DataConfig", "ExportConfig", "KeepConfig", "LogConfig",
    "LoraConfig", "MeshConfig", "ModelSettings", "ScratchConfig", "TrainConfig", "broken_rules", "changed",
    "config_name", "config_of", "default_config_dict", "eval_config_dict", "from_config_dict", "load_config",
    "nested_overrides", "paper_config_dict", "profile_window", "read_config", "read_override", "validate",
]  # fmt: skip
