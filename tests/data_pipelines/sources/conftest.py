"""Published layouts of question and region sets, a few records each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ANSWERS = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "net", "netting"]


class Raw:
    """A folder that files are written into as they are downloaded."""

    def __init__(self, folder: Path, picture: Callable[..., bytes]) -> None:
        self.folder, self._picture = folder, picture

    def json(self, name: str, value: Any) -> str:
        """The path of a new JSON file."""
        path = self.folder / name
        path.write_text(json.dumps(value), encoding="utf-8")
        return str(path)

    def images(self, *names: str, size: tuple[int, int] = (100, 50), kind: str = "JPEG") -> str:
        """The folder of new pictures."""
        for number, name in enumerate(names):
            path = self.folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._picture(number, kind, size))
        return str(self.folder / "images")


def _human(answers: list[str], raw: bool = False) -> list[dict[str, Any]]:
    extra = {"raw_answer": "Netting!"} if raw else {}
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number, **extra}
        for number, answer in enumerate(answers, 1)
    ]


def _vqav2(raw: Raw) -> dict[str, str]:
    about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014", "task_type": "Open-Ended"}
    questions = [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 262146, "question": "What color is the snow?", "question_id": 262146000},
        {"image_id": 458752, "question": "Is this man wearing a hat?", "question_id": 458752001},
    ]
    kinds = {"question_type": "what", "answer_type": "other"}
    answers = [
        {**kinds, "multiple_choice_answer": best, "answers": _human(given), "image_id": image, "question_id": question}
        for image, question, best, given in (
            (262146, 262146000, "white", ["white"] * 10),
            (458752, 458752001, "yes", ["yes"] * 10),
            (458752, 458752000, "net", ANSWERS),
        )
    ]
    return {
        "questions": raw.json("v2_OpenEnded_mscoco_train2014_questions.json", {**about, "questions": questions}),
        "annotations": raw.json("v2_mscoco_train2014_annotations.json", {**about, "annotations": answers}),
        "images": raw.images("COCO_train2014_000000458752.jpg", "COCO_train2014_000000262146.jpg"),
    }


def _okvqa(raw: Raw) -> dict[str, str]:
    question = {"image_id": 51606, "question": "What is the hairstyle of the blond called?", "question_id": 516065}
    answers = _human(["pony tail"] * 4 + ["braid"] * 2 + ["ponytail"] * 4, raw=True)
    annotation = {"image_id": 51606, "question_id": 516065, "answers": answers, "confidence": 3, "answer_type": "other"}
    about = {"data_subtype": "val2014"}
    return {
        "questions": raw.json("OpenEnded_mscoco_val2014_questions.json", {**about, "questions": [question]}),
        "annotations": raw.json("mscoco_val2014_annotations.json", {**about, "annotations": [annotation]}),
        "images": raw.images("000000051606.jpg"),  # the name COCO 2017 has for it
        "split": "val",
    }


def _gqa(raw: Raw) -> dict[str, str]:
    def question(image: str, text: str, answer: str, full: str) -> dict[str, Any]:
        return {"imageId": image, "question": text, "answer": answer, "fullAnswer": full, "isBalanced": True}

    questions = {
        "02930152": question("2354786", "Is the sky dark?", "yes", "Yes, the sky is dark."),
        "05515938": question("n161313", "What is in the bag?", "food", "The food is in the bag."),
        "07333408": question("2354786", "What is on the white wall?", "pipe", "The pipe is on the wall."),
    }
    return {
        "file": raw.json("train_balanced_questions.json", questions),
        "images": raw.images("2354786.jpg", "n161313.jpg"),
    }


def _textvqa(raw: Raw) -> dict[str, str]:
    def question(id_: int, image: str, text: str) -> dict[str, Any]:
        other = {"image_width": 1024, "image_height": 664, "question_tokens": [], "set_name": "train"}
        return {"question_id": id_, "image_id": image, "question": text, "answers": ANSWERS, **other}

    questions = [
        question(0, "0054c91397f2fe05", "what is the brand of phone?"),
        question(1, "00a1", "what does it say?"),
        question(2, "0054c91397f2fe05", "what number is on the player's jersey?"),
    ]
    about = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return {
        "file": raw.json("TextVQA_0.5.1_train.json", {**about, "data": questions}),
        "images": raw.images("0054c91397f2fe05.jpg", "00a1.jpg"),
    }


def _ocrvqa(raw: Raw) -> dict[str, str]:
    def book(split: int, extension: str) -> dict[str, Any]:
        return {
            "imageURL": f"http://ecx.images-amazon.com/images/I/51UJnL3Tx6L.{extension}",
            "questions": ["Who wrote this book?", "What is the genre of this book?"],
            "answers": ["Mary Kay Andrews", "Calendars"],
            "title": "Mug Shots",
            "authorName": "",
            "genre": "Calendars",
            "split": split,
        }

    books = {"761183272": book(1, "jpg"), "1439176582": book(3, "jpg"), "B001": book(1, "png")}
    raw.images("B001.png", kind="PNG")
    return {"file": raw.json("dataset.json", books), "images": raw.images("761183272.jpg")}


def _docvqa(raw: Raw) -> dict[str, str]:
    def question(id_: int, page: str, text: str, answers: list[str]) -> dict[str, Any]:
        return {
            "questionId": id_,
            "question": text,
            "question_types": ["handwritten", "form"],
            "image": f"documents/{page}.png",
            "docId": 279,
            "ucsf_document_id": page.partition("_")[0],
            "ucsf_document_page_no": page.partition("_")[2],
            "answers": answers,
            "data_split": "train",
        }

    questions = [
        question(337, "xnbl0037_1", "what is the date mentioned in this letter?", ["1/8/93", "January 8, 1993"]),
        question(338, "xnbl0037_1", "what is the contact person name?", ["P. Carter"]),
        question(339, "pybv0228_81", "Which corporation's letterhead is this?", ["Brown & Williamson"]),
    ]
    about = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "train"}
    return {
        "file": raw.json("train_v1.0_withQT.json", {**about, "data": questions}),
        "images": raw.images("xnbl0037_1.png", "pybv0228_81.png", kind="PNG"),
    }


def _visual_genome(raw: Raw) -> dict[str, str]:
    def region(id_: int, phrase: str, x: int, y: int, width: int, height: int) -> dict[str, Any]:
        where = {"x": x, "y": y, "width": width, "height": height}
        return {"region_id": id_, "image_id": 1, "phrase": phrase, **where}

    regions = [
        {
            "id": 1,
            "regions": [region(1382, "the clock is green ", 10, 5, 30, 20), region(1383, "a shade", 0, 0, 50, 50)],
        },
        {"id": 2, "regions": [region(2000, "a road", -1, 40, 102, 11)]},
    ]
    sizes = [
        {"image_id": 1, "width": 100, "height": 50, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"},
        {"image_id": 2, "width": 100, "height": 50, "url": "https://cs.stanford.edu/people/rak248/VG_100K/2.jpg"},
    ]
    return {
        "file": raw.json("region_descriptions.json", regions),
        "image_data": raw.json("image_data.json", sizes),
        "images": raw.images("VG_100K_2/1.jpg", "VG_100K/2.jpg"),
    }


def _refcoco(raw: Raw) -> dict[str, str]:
    def ref(id_: int, annotation: int, split: str, *sentences: str) -> dict[str, Any]:
        image = "COCO_train2014_000000581857"
        said = [{"tokens": s.split(), "raw": s, "sent_id": 10 * id_ + n, "sent": s} for n, s in enumerate(sentences)]
        about = {"category_id": 1, "image_id": 581857, "sent_ids": [s["sent_id"] for s in said]}
        return {
            "ref_id": id_,
            "ann_id": annotation,
            "split": split,
            "file_name": f"{image}_{id_}.jpg",
            "sentences": said,
        } | about

    refs = [
        ref(0, 1719310, "train", "the lady with the blue shirt", "lady with back to us"),
        ref(1, 489068, "testA", "woman in gray shirt"),
        ref(2, 489068, "train", "woman facing her"),
    ]
    instances = {
        "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 100, "height": 50}],
        "annotations": [
            {"id": 1719310, "image_id": 581857, "category_id": 1, "bbox": [10.0, 5.0, 30.0, 20.0], "iscrowd": 0},
            {"id": 489068, "image_id": 581857, "category_id": 1, "bbox": [60.51, 0, 39.5, 50.0], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    return {
        "file": raw.json("refs_unc.json", refs),
        "instances": raw.json("instances.json", instances),
        "images": raw.images("COCO_train2014_000000581857.jpg"),
    }


PUBLISHED = {
    "vqav2": _vqav2,
    "okvqa": _okvqa,
    "gqa": _gqa,
    "textvqa": _textvqa,
    "ocrvqa": _ocrvqa,
    "docvqa": _docvqa,
    "visual_genome": _visual_genome,
    "refcoco": _refcoco,
}


@pytest.fixture
def raw(tmp_path: Path, picture: Callable[..., bytes]) -> Raw:
    """A folder for downloads."""
    return Raw(tmp_path, picture)


@pytest.fixture
def published(raw: Raw) -> Callable[[str], dict[str, str]]:
    """`published(name)`: the options of source `name` for a set written as it is published."""
    return lambda name: PUBLISHED[name](raw)
