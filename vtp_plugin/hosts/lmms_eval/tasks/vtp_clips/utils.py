"""The tasks read the same rows; each takes its own question and answer, and may show the frames in another order.

Hosts that are given messages get frames; hosts that open files get a file in the cache folder, encoded on first use.
"""

from functools import partial

import numpy as np
from PIL import Image

from vtp_plugin.hosts.lmms_eval.tasks.vtp_scenes import utils as scenes
from vtp_plugin.tiny.checkpoint import cache_folder
from vtp_plugin.tiny.clips.clip import FRAMES
from vtp_plugin.tiny.clips.testset import read

FRAMES_A_SECOND = 2


task_docs = partial(scenes.task_docs, shown=("clip", "ground", "stays"))
doc_to_text, process_results = scenes.doc_to_text, scenes.process_results  # asked and judged as scenes are
which_docs = partial(task_docs, task="which")
moves_docs = partial(task_docs, task="moves")
first_docs = partial(task_docs, task="first")
digit_docs = partial(task_docs, task="digit")


def in_time(doc):
    return range(FRAMES)


def shuffled(doc):
    """A control: the frames in an order that is the clip's own and never the true one."""
    rng = np.random.default_rng([5, doc["clip"]])
    orders = (rng.permutation(FRAMES).tolist() for _ in iter(int, 1))
    return next(order for order in orders if order != [*range(FRAMES)])


def last(doc):
    """A control: the last frame, as often as there are frames."""
    return [FRAMES - 1] * FRAMES


def show(doc, order):
    frames = read(doc).frames()
    return [Image.fromarray(frames[time]) for time in order(doc)]


def messages(doc, lmms_eval_specific_kwargs=None, *, order):
    text = {"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)}
    return [{"role": "user", "content": [{"type": "video", "url": show(doc, order)}, text]}]


def file(doc, *, order):
    path = cache_folder() / "clips" / f"{order.__name__}-{doc['clip']}.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, show(doc, order))
    return [str(path)]


def encode(path, frames):
    """H.264, nearly without loss; written aside, then renamed."""
    import os

    import av

    aside = path.with_name(f".{os.getpid()}-{path.name}")
    with av.open(str(aside), "w") as video:
        stream = video.add_stream("libx264", rate=FRAMES_A_SECOND, options={"crf": "8"})
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, "yuv420p"
        for packet in [p for f in frames for p in stream.encode(av.VideoFrame.from_image(f))] + stream.encode():
            video.mux(packet)
    aside.replace(path)


doc_to_messages, doc_to_visual = partial(messages, order=in_time), partial(file, order=in_time)
shuffled_to_messages, shuffled_to_visual = partial(messages, order=shuffled), partial(file, order=shuffled)
last_to_messages, last_to_visual = partial(messages, order=last), partial(file, order=last)
