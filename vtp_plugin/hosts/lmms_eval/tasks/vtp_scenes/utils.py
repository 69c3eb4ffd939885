"""The tasks read the same rows; each takes its own question and answer."""

from functools import partial

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
NAMES = {*SHAPES, *"0123456789"}
Verdict = tuple[bool, bool]  # the truth is yes, the prediction is yes


def task_docs(dataset, task, shown=("scene", "image")):
    """Keep the columns of what is shown; the task's own become `question` and `answer`."""
    kept = dataset.select_columns([*shown, f"{task}_question", f"{task}_answer"])
    return kept.rename_columns({f"{task}_question": "question", f"{task}_answer": "answer"})


presence_docs = partial(task_docs, task="presence")
attribute_docs = partial(task_docs, task="attribute")
count_docs = partial(task_docs, task="count")
position_docs = partial(task_docs, task="position")
digit_docs = partial(task_docs, task="digit")
caption_docs = partial(task_docs, task="caption")


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The word that is asked for stands last: a post_prompt would move it."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def read_answer(results) -> str:
    """The first word. A model that has lost many tokens may go on talking; what it says first is its answer."""
    words = results[0].lower().split()
    return words[0].strip(".,") if words else ""


def process_results(doc, results):
    return {"exact_match": float(read_answer(results) == doc["answer"])}


def process_presence(doc, results):
    """POPE's metrics. An answer that is neither yes nor no counts as wrong and as not yes."""
    answer = read_answer(results)
    hit, verdict = float(answer == doc["answer"]), (doc["answer"] == "yes", answer == "yes")
    return {"exact_match": hit, "accuracy": hit} | dict.fromkeys(("f1", "precision", "recall", "yes_ratio"), verdict)


def process_caption(doc, results):
    """F1 of the shapes and the digit that the caption names; an invented one costs as much as a missing one."""
    said, true = mentions(results[0].lower()), mentions(doc["answer"])
    return {"caption_f1": 2 * len(said & true) / (len(said) + len(true))}


def mentions(caption) -> set[str]:
    """The words of a caption that name something."""
    return {word for word in caption.replace(",", " ").replace(".", " ").split() if word in NAMES}


def ratio(part, whole) -> float:
    return part / whole if whole else 0.0


def precision(verdicts: list[Verdict]) -> float:
    return ratio(sum(truth and said for truth, said in verdicts), sum(said for _, said in verdicts))


def recall(verdicts: list[Verdict]) -> float:
    return ratio(sum(truth and said for truth, said in verdicts), sum(truth for truth, _ in verdicts))


def f1(verdicts: list[Verdict]) -> float:
    """The harmonic mean of precision and recall of `yes`."""
    p, r = precision(verdicts), recall(verdicts)
    return ratio(2 * p * r, p + r)


def yes_ratio(verdicts: list[Verdict]) -> float:
    """The share of predictions that say yes; the truth's share is one half."""
    return ratio(sum(said for _, said in verdicts), len(verdicts))
