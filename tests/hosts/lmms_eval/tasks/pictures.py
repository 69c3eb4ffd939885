"""What the two tasks show of a document."""

from pathlib import Path


def doc_to_visual(doc):
    return [picture.convert("RGB") for picture in doc["pictures"]]


def doc_to_video(doc):
    return [str(Path(__file__).parent / doc["video"])]
