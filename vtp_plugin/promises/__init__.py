"""Does a model family keep its promises? A kit for the built-in families and for those of strangers alike."""

from vtp_plugin.promises.case import Case as Case
from vtp_plugin.promises.checks import promises as promises
