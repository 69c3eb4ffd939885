"""Visual token pruning for vision-language models, as a plugin. Importing this imports no host framework."""

from vtp_plugin.hookspecs import hookimpl
from vtp_plugin.plugins import get_strategy, list_strategies
from vtp_plugin.pruning import prune
from vtp_plugin.signals import signal
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens
from vtp_plugin.version import __version__

__all__ = [
    "PruningStrategy",
    "Selection",
    "Stage",
    "VisualTokens",
    "__version__",
    "get_strategy",
    "hookimpl",
    "list_strategies",
    "prune",
    "signal",
]
