"""`prune(model, ...)`: attach strategies to a model, and the handle that knows what they did."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vtp_plugin import fits, plugins, signals
from vtp_plugin.adapter import Adapter, find_adapter
from vtp_plugin.clock import clock
from vtp_plugin.config import NONE, Spec, describe, resolve
from vtp_plugin.errors import NothingPruned, PruningError
from vtp_plugin.hookspecs import hookimpl
from vtp_plugin.metrics import latency, watching
from vtp_plugin.metrics.totals import Totals
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import asking
from vtp_plugin.surgery.call import Call, PruningEvent
from vtp_plugin.surgery.copies import make_copyable
from vtp_plugin.surgery.decoder import DecoderCuts
from vtp_plugin.surgery.judging import Judgement
from vtp_plugin.surgery.owning import OneAtATime, unwrapped
from vtp_plugin.surgery.pixels import watch as watch_processor
from vtp_plugin.surgery.places import Places
from vtp_plugin.surgery.positions import Choice, OriginalPositions
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import VisionCuts

MARK = "_vtp_pruned"
EVENTS_KEPT = 10_000


def prune(
    model: nn.Module, strategies: Spec, /, *, processor: Any = None, measure: bool = False, **hyper: Any
) -> Pruned:
    """Attach strategies to a model until `detach()` or the end of a `with` block.

    `strategies`: a name ("atp", "vprune+fastv", "none"), a YAML file, a strategy object, or a list of these.
    `processor`: the model's processor; needed by strategies that look at pixels or read the question.
    `measure`: time the parts of every call (synchronises the device) and count its decoding steps.
    `hyper`: hyper-parameters of the named strategies, e.g. keep_ratio=0.6.
    Raises PruningError, with the model as it was, if the strategies do not fit the model.
    """
    chosen = resolve(strategies, hyper)
    model = unwrapped(model)
    if vars(model).get(MARK) is not None:
        names = "+".join(s.name for s in vars(model)[MARK].strategies) or "none"
        raise PruningError(f"the model is already pruned by {names}: detach it first, or name several strategies")
    adapter = find_adapter(model, processor, plugins.adapters())
    return Pruned(model, adapter, chosen, measure=measure)


class Pruned(OneAtATime):
    """A model with strategies attached. `events` holds the cuts of the last calls, newest last."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, strategies: Sequence[PruningStrategy], *, measure: bool
    ) -> None:
        self.model, self.adapter, self.strategies = model, adapter, list(strategies)
        super().__init__()
        self.events: deque[PruningEvent] = deque(maxlen=EVENTS_KEPT)
        self._totals = Totals(self)
        self.finished: list[Callable[[Call], None]] = [self._totals.add]  # called with every call that ended well
        self.failure: BaseException | None = None  # the first exception inside a call, even if the host swallowed it
        self._processed = 0.0  # seconds of image processing since the last call
        self._called, self._measured = False, measure
        self.keep_decisions = False  # until the call has ended, for who observes
        self._undo = Undo()
        try:
            self._attach(measure)
        except BaseException:
            self._undo.close()
            raise

    def _attach(self, measure: bool) -> None:
        self.vision = vision = VisionCuts(self, self.adapter.layout)
        for strategy in self.strategies:
            if not self.adapter.stages[strategy.stage] and (wrong := self._wrong(strategy, vision)):
                raise strategy.error(wrong)
            if reason := self._unfit(strategy, vision):
                possible = [name for name, cls in plugins.strategies().items() if self._fits(cls(), vision)]
                raise strategy.error(f"{reason}; possible here: {', '.join(possible)}")
        fits.refuse_budgets(self.strategies, self.adapter.image_tokens)
        self.positions = Choice.of(self.strategies, self.adapter)
        decoder = DecoderCuts(self, self.adapter.decoder_layers, [s for s in self.strategies if s.stage is Stage.LLM])
        vision.prepare()
        decoder.prepare()
        self.spaces = vision.spaces
        observed = Undo()
        self._undo.callback(observed.close)
        watching.watch(self, observed)  # first, so that it sees what the cuts make of a block's output
        vision.install(self._undo)
        decoder.install(self._undo)
        if self.positions.prompt == "original" and self.adapter.language_model is not None:
            OriginalPositions(self).install(self._undo)
        self.adapter.install(self, self._undo)
        asking.guard(self, self._undo)
        read = [part for part in vars(self.adapter.tower).values() if isinstance(part, nn.Module)]
        self._places = Places(self.model, [*self._undo.modules, *read] if self.strategies else [])
        if vision.pixels is not None:
            self._watch_processor(vision)
        if measure:
            self._measure()
        make_copyable(self.model, MARK, self._undo)
        object.__setattr__(self.model, MARK, self)
        self._undo.callback(object.__delattr__, self.model, MARK)

    def _unfit(self, strategy: PruningStrategy, vision: VisionCuts) -> str:
        """Why the model cannot give the strategy what it needs; "" if it can."""
        if reason := self.adapter.stages[strategy.stage]:
            return f"{self.adapter.models} has no {strategy.stage.value} stage: {reason}"
        return vision.lacking(strategy)

    def _wrong(self, strategy: PruningStrategy, vision: VisionCuts) -> str:
        """Which of the strategy's needs its stage does not give; "" if it gives all."""
        return signals.wrong(strategy, inside=vision.inside(strategy))

    def _fits(self, strategy: PruningStrategy, vision: VisionCuts) -> bool:
        return not (self._unfit(strategy, vision) or self._wrong(strategy, vision))

    def _watch_processor(self, vision: VisionCuts) -> None:
        """Let pixels-stage strategies see images at full precision, as they leave the image processor."""
        processor = self.adapter.image_processor

        def listen(images: Any, outputs: Any, seconds: float) -> None:
            vision.pixels.remember(outputs)
            plugins.manager().hook.vtp_images_processed(processor=processor, images=images, outputs=outputs)

        if hasattr(processor, "preprocess"):  # else pictures are prepared by somebody else
            self._undo.callback(watch_processor(processor, listen))

    def _measure(self) -> None:
        """Time the parts of every call, and the image processing before it."""
        latency.watch(self, self._undo)
        for processor in self.adapter.visual_processors:
            self._undo.callback(watch_processor(processor, self._add_processing))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _add_processing(self, images: Any, outputs: Any, seconds: float) -> None:
        self._processed += seconds

    def detach(self) -> None:
        """Give the model back as it was, hooks and all; harmless when repeated.

        A call in another thread ends first. PruningError inside of a call of this thread's own.
        """
        if self.mine:
            raise PruningError("detach when the call is over: what it has pruned it cannot go on with otherwise")
        with self.alone():
            self._undo.close()

    def __reduce__(self) -> Any:
        raise PruningError("what is attached belongs to its model: copy the model, and prune the copy")

    def summary(self) -> str:
        """What all calls so far came to, in one line."""
        from vtp_plugin.reporting import summary

        return summary.line(describe(self.strategies), self._totals.entry())

    def on_detach(self, callback: Callable[[], None]) -> None:
        """Call this when the model is given back."""
        self._undo.callback(callback)

    def __enter__(self) -> Pruned:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    # -- for the surgery ------------------------------------------------------------------------------------------

    @contextmanager
    def calling(self) -> Iterator[Call]:
        """One call of the host model; proves at its end that every strategy has cut."""
        self._places.check()
        device, decisions = self.device, [] if self.keep_decisions else None
        call = Call(warmup=not self._called, decisions=decisions, device=device, measured=self._measured)
        self._called = True
        call.spend("image_processing", self._processed)
        self._processed, call.started = 0.0, clock(device, waiting=call.measured)
        try:
            with self.going_on(call):
                yield call
            self._prove(call)
            if self._totals.add in self.finished:  # a server counts nothing
                self._totals.foresee(call)
            call.settle()
        except BaseException as error:
            self.failure = self.failure or error
            raise
        call.spend("total", clock(device, waiting=call.measured) - call.started)
        call.first_token = call.seconds["total"] if call.first_token is None else call.first_token
        self.events.extend(call.events)
        for listener in self.finished:
            listener(call)

    @contextmanager
    def judging(self, strategy: PruningStrategy, layer: int | None = None) -> Iterator[Judgement]:
        """Time the signals and the decision of one cut, and report it."""
        judgement = Judgement(self.call, strategy, layer)
        with self.timed("selector") as spent:
            yield judgement
        if judgement.before:
            event = judgement.event(spent[0])
            self.call.events.append(event)
            plugins.manager().hook.vtp_tokens_pruned(event=event)

    @contextmanager
    def timed(self, part: str) -> Iterator[list[float]]:
        """Add the wall time of the block to a part of the call; the list holds it afterwards."""
        spent = [0.0]
        latency.begin(self.call, part)
        yield spent
        spent[0] = latency.end(self.call)

    @property
    def device(self) -> torch.device:
        """Where the model computes: the device of its first weights that are not offloaded."""
        devices = (weight.device for weight in self.model.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    @property
    def one_by_one(self) -> bool:
        """Whether images have to pass the tower singly, because their token counts may come out unequal."""
        return any(not s.budgeted for s in self.strategies if s.stage is not Stage.LLM)

    def _prove(self, call: Call) -> None:
        if call.positions is not None and not call.positions_used:
            raise NothingPruned("positions=original: the language model's rotary embedding was never called")
        if not any(image.columns is None or len(image.columns) for image in call.images):
            return
        cut = {event.strategy for event in call.events}
        for strategy in self.strategies:
            if strategy.name not in cut:
                raise NothingPruned(
                    f"{strategy.name}: {len(call.images)} images went through the model, but nothing was cut at its "
                    f"{strategy.stage.value} stage; the model's parts are not where the adapter "
                    f"'{self.adapter.family}' expects them"
                )


@hookimpl(trylast=True)
def vtp_model_loaded(lm: Any, model: nn.Module, processor: Any, config: list[PruningStrategy]) -> Pruned:
    return prune(model, config or NONE, processor=processor, measure=True)
