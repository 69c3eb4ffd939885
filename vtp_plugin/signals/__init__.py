"""Signals: what a strategy can ask for beside tokens, grid and index. One declaration each, wherever its module is.

`declaration` is the decorator `signal` and the questions that the machinery asks about what was declared, `views` is
what a reader of a signal gets to see, `synthetic` makes samples without a model, `table` the documentation. The
other modules declare the built-in signals and are imported below; a package of yours needs `signal` only.
"""

from vtp_plugin.signals.declaration import (
    Signal,
    Tap,
    everything,
    found_in,
    given,
    names,
    needed,
    reads_question,
    signal,
    taps,
    wrong,
)
from vtp_plugin.signals.views import BlockView, EmbeddingView, LayerView, MergingView, PatchesView, RowsView, View

from vtp_plugin.signals import early, film, language, late  # isort: skip  # the built-in declarations

__all__ = [
    "BlockView",
    "EmbeddingView",
    "LayerView",
    "MergingView",
    "PatchesView",
    "RowsView",
    "Signal",
    "Tap",
    "View",
    "early",
    "everything",
    "film",
    "found_in",
    "given",
    "language",
    "late",
    "names",
    "needed",
    "reads_question",
    "signal",
    "taps",
    "wrong",
]
