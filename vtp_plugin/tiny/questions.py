"""What can be asked and said about a scene. The word that is asked for always stands last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import COLORS, CORNERS, NUMBERS, SHAPES, Scene

TASKS = ("presence", "attribute", "count", "position", "digit")
CHOICES = {
    "presence": ("yes", "no"),
    "attribute": tuple(COLORS),
    "count": NUMBERS,
    "position": CORNERS,
    "digit": tuple("0123456789"),
}
LOOKALIKES = {  # the hard negatives: absent shapes that are easily taken for a present one
    "circle": "ring",
    "ring": "circle",
    "square": "diamond",
    "diamond": "square",
    "triangle": "heart",
    "heart": "triangle",
    "star": "cross",
    "cross": "star",
}


@dataclass(frozen=True)
class Question:
    task: str
    text: str
    answer: str


def plural(shape: str) -> str:
    return shape + "es" if shape.endswith("s") else shape + "s"


def ask_presence(scene: Scene, rng: np.random.Generator, present: bool, hard: bool = False) -> Question:
    """`hard` asks for the lookalike of a shape that is there, when one is absent."""
    absent = [shape for shape in SHAPES if shape not in scene.counts]
    lookalikes = [LOOKALIKES[shape] for shape in scene.counts if LOOKALIKES[shape] in absent]
    pool = list(scene.counts) if present else lookalikes if hard and lookalikes else absent
    return Question("presence", f"is there a {rng.choice(pool)}", "yes" if present else "no")


def ask_attribute(scene: Scene, rng: np.random.Generator) -> Question:
    shape = str(rng.choice(list(scene.unique)))
    return Question("attribute", f"what color is the {shape}", scene.unique[shape].color)


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    number = NUMBERS[scene.counts[scene.counted] - 1]
    return Question("count", f"how many {plural(scene.counted)}", number)


def ask_position(scene: Scene, rng: np.random.Generator) -> Question:
    shape = str(rng.choice(list(scene.unique)))
    return Question("position", f"where is the {shape}", scene.unique[shape].corner)


def ask_digit(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("digit", "what is the digit", str(scene.plate.digit))


def ask_all(scene: Scene, rng: np.random.Generator) -> dict[str, Question]:
    """One question per task; presence is a coin toss, half of its negatives are hard."""
    return {
        "presence": ask_presence(scene, rng, bool(rng.integers(2)), bool(rng.integers(2))),
        "attribute": ask_attribute(scene, rng),
        "count": ask_count(scene, rng),
        "position": ask_position(scene, rng),
        "digit": ask_digit(scene, rng),
    }


def ask_caption(scene: Scene) -> Question:
    """What is there: every shape once, in the order of SHAPES, and the digit."""
    return Question("caption", "describe the picture", f"{', '.join(scene.counts)} and the digit {scene.plate.digit}")


def ask_eight(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A training lesson: every task, presence both ways, count thrice because it is learned last."""
    return [
        ask_presence(scene, rng, True),
        ask_presence(scene, rng, False, bool(rng.integers(2))),
        *(ask(scene, rng) for ask in (ask_attribute, ask_position, ask_digit, ask_count, ask_count, ask_count)),
    ]


# -- captions ----------------------------------------------------------------------------------------------------------

Claim = tuple[str, str]  # (shape, colour), (shape, ""), ("", colour) or ("digit", "7")


@dataclass(frozen=True)
class Caption:
    """A text and the claims that make it true of a scene."""

    text: str
    claims: tuple[Claim, ...]


def facts(scene: Scene) -> set[Claim]:
    """Every claim that is true of the scene."""
    true: set[Claim] = {("digit", str(scene.plate.digit)), ("digit", "")}
    for thing in scene.things:
        if thing.color:
            true |= {(thing.shape, thing.color), (thing.shape, ""), ("", thing.color)}
    return true


def describe(claim: Claim) -> str:
    shape, color = claim
    if shape == "digit":
        return f"the digit {color}"
    return " ".join(word for word in ("a", color, shape or "shape") if word)


def caption_scene(scene: Scene, rng: np.random.Generator) -> Caption:
    """Everything in it, in random order."""
    claims = sorted({(thing.shape, thing.color) for thing in scene.things if thing.color})
    claims.append(("digit", str(scene.plate.digit)))
    return join("a photo of {}", [claims[i] for i in rng.permutation(len(claims))])


def caption_part(scene: Scene, rng: np.random.Generator) -> Caption:
    """One thing of it: a phrase, or a question that names the thing."""
    thing = scene.things[rng.integers(len(scene.things))]
    if thing.digit is not None:
        return [join("{}", [("digit", str(thing.digit))]), Caption("what is the digit", (("digit", ""),))][
            rng.integers(2)
        ]
    shape, color = thing.shape, thing.color
    phrases = (
        join("{}", [(shape, color)]),
        join("a photo of {}", [(shape, color)]),
        join("{}", [(shape, "")]),
        join("{}", [("", color)]),
        join("is there {}", [(shape, "")]),
        Caption(f"what color is the {shape}", ((shape, ""),)),
        Caption(f"where is the {shape}", ((shape, ""),)),
        Caption(f"how many {plural(shape)}", ((shape, ""),)),
        Caption(f"the {color} {shape}", ((shape, color),)),
    )
    return phrases[rng.integers(len(phrases))]


def join(template: str, claims: list[Claim]) -> Caption:
    listed = ", ".join(map(describe, claims))
    return Caption(template.format(listed), tuple(claims))
