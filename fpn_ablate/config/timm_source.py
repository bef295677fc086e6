"""`backbone=timm/MODEL` for Hydra: a file conf/backbone/timm/MODEL.yaml for every MODEL, none of which is written.

Each is conf/backbone/timm.yaml with `model` filled in. So a model can stand wherever a backbone can: on the command line, among
others in a sweep, in an experiment's file. Whether timm has it is asked when the configuration is validated.
"""

from pathlib import Path

from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from fpn_ablate.utils.paths import CONF

GROUP = "backbone/timm/"


class TimmConfigs(ConfigSource):
    """On the search path (conf/config.yaml) as timm://."""

    @staticmethod
    def scheme() -> str:
        return "timm"

    def load_config(self, config_path: str) -> ConfigResult:
        config = OmegaConf.load(Path(CONF, GROUP.rstrip("/") + ".yaml"))
        config.model = self._model(config_path)
        return ConfigResult(self.provider, self.full_path(), config, {"package": None})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith(GROUP) and self._model(config_path) != ""

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    @staticmethod
    def _model(config_path: str) -> str:
        return config_path.removeprefix(GROUP).removesuffix(".yaml")


def register() -> None:
    """Make Hydra know the scheme; again is harmless."""
    Plugins.instance().register(TimmConfigs)
