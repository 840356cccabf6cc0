"""Small zero-shot tasks in a folder, one in each form of the paper's seven, and their expected accuracies.

lm-eval is not used here: the texts and their likelihoods are computed independently.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_models import byte_tokenizer

ITEMS = 24
Item = dict[str, Any]
Texts = list[tuple[str, str]]
"""A context and its continuation, for each answer."""
WORDS = ("ox", "river", "stone", "a", "lantern", "blue", "of", "machine", "it", "whistle", "no", "under")


@dataclass(frozen=True)
class Form:
    """A form of tasks: its file for lm-eval, an item of it, and the requests to the model for an item."""

    yaml: str
    item: Callable[[random.Random], Item]
    texts: Callable[[Item], Texts]
    right: Callable[[Item], int]
    answers: Callable[[Item], Sequence[str]]
    """The texts by whose lengths `acc_norm` divides."""


def _phrase(draw: random.Random, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def _choice_item(draw: random.Random) -> Item:
    return {"goal": _phrase(draw, 5), "answers": [_phrase(draw, 6) for _ in range(3)], "label": draw.randrange(3)}


def _blank_item(draw: random.Random) -> Item:
    sentence = f"{_phrase(draw, 3)} _ {_phrase(draw, 4)}"
    options = {"option1": _phrase(draw, 3), "option2": _phrase(draw, 3)}
    return {"sentence": sentence, **options, "answer": draw.choice("12")}


def _yes_item(draw: random.Random) -> Item:
    return {"passage": _phrase(draw, 9), "question": _phrase(draw, 4), "label": draw.randrange(2)}


def _blank_texts(item: Item) -> Texts:
    before, after = item["sentence"].split("_")
    return [(before + item[option], f" {after.strip()}") for option in ("option1", "option2")]


_CHOICE = Form(
    yaml="""
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: answers
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    item=_choice_item,
    texts=lambda item: [(f"Question: {item['goal']}\nAnswer:", f" {answer}") for answer in item["answers"]],
    right=lambda item: int(item["label"]),
    answers=lambda item: item["answers"],
)
FORMS = {
    "piqa": _CHOICE,
    "arc_challenge": _CHOICE,
    "winogrande": Form(
        # lm-eval's own functions: the context differs and what follows is the same.
        yaml="\n".join(
            f"doc_to_{part}: !function lm_eval.tasks.winogrande.preprocess_winogrande.doc_to_{part}"
            for part in ("text", "target", "choice")
        )
        + "\nmetric_list: [{metric: acc}]\n",
        item=_blank_item,
        texts=_blank_texts,
        right=lambda item: "12".index(item["answer"]),
        answers=lambda item: (item["option1"], item["option2"]),
    ),
    "boolq": Form(
        yaml="""
doc_to_text: "{{passage}}\\nQuestion: {{question}}?\\nAnswer:"
doc_to_target: label
doc_to_choice: ["no", "yes"]
metric_list: [{metric: acc}]
""",
        item=_yes_item,
        texts=lambda item: [
            (f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", f" {answer}") for answer in ("no", "yes")
        ],
        right=lambda item: int(item["label"]),
        answers=lambda _: ("no", "yes"),
    ),
}
"""The forms by task name."""


def items_of(task: str) -> list[Item]:
    """Return the fixed items of a task."""
    draw = random.Random(task)
    return [FORMS[task].item(draw) for _ in range(ITEMS)]


def write_task(folder: Path, name: str, form: str, items: Sequence[Item], output_type: str = "multiple_choice") -> None:
    """Write a task's file and its items beside it, for the file's paths are relative to it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {name}.jsonl}}}}\n"
    middle = f"output_type: {output_type}\nvalidation_split: validation\n"
    (folder / f"{name}.yaml").write_text(head + middle + FORMS[form].yaml.lstrip())


def write_tasks(folder: Path) -> Path:
    """Write a task of each form; returns the folder."""
    for name in FORMS:
        write_task(folder, name, name, items_of(name))
    return folder


def expected_accuracies(causal_lm: Any, task: str, limit: int = ITEMS) -> tuple[float, float]:
    """Return the expected `acc` and `acc_norm` of a model with one token per byte, computed without lm-eval."""
    form, items = FORMS[task], items_of(task)[:limit]
    right = norm_right = 0
    for item in items:
        likelihoods = [_likelihood(causal_lm, *texts) for texts in form.texts(item)]
        lengths = [len(answer) for answer in form.answers(item)]
        norms = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
        right += likelihoods.index(max(likelihoods)) == form.right(item)
        norm_right += norms.index(max(norms)) == form.right(item)
    return right / len(items), norm_right / len(items)


def _likelihood(causal_lm: Any, context: str, answer: str) -> float:
    before, after = (byte_tokenizer()(text)["input_ids"] for text in (context, answer))
    with torch.inference_mode():
        told = causal_lm(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(float(told[len(before) - 1 + i, token]) for i, token in enumerate(after))
