"""What the policy is asked: arithmetic questions, how they become prompts, and their reward."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import re
from collections.abc import Callable, Sequence

import jinja2
import tokenizers

MAX_RESPONSE_TOKENS = 20


@dataclasses.dataclass(frozen=True)
class Question:
    """A question in plain text and the number that answers it."""

    text: str
    answer: int


def _sums() -> list[Question]:
    return [Question(f"What is {x} + {y}? Reply with the number only.", x + y)
            for x in range(2, 10) for y in range(2, 10)]


def _products() -> list[Question]:
    return [Question(f"What is {x} times {y}? Reply with the number only.", x * y)
            for x in range(2, 10) for y in range(2, 10)]


# Every question of a task; few enough that greedy accuracy can be measured on all of them.
TASKS: dict[str, Callable[[], list[Question]]] = {"sum": _sums, "product": _products}


def draw(questions: Sequence[Question], num: int, seed: int, step: int) -> list[Question]:
    """Draws `num` different questions; the same for the same (seed, step)."""
    return random.Random(f"{seed} {step}").sample(questions, num)


def is_right(question: Question, reply: str) -> bool:
    """Says whether the last number in the reply is the answer."""
    numbers = re.findall(r"-?\d+", reply)
    return bool(numbers) and int(numbers[-1]) == question.answer


def reward(question: Question, reply: str, has_stopped: bool) -> float:
    """0.4 for ending by itself within MAX_RESPONSE_TOKENS, 0.6 for the right number."""
    return 0.4 * has_stopped + 0.6 * is_right(question, reply)


class ChatFormat:
    """Turns questions into token ids and responses into text, as the model's folder says."""

    def __init__(self, model_folder: pathlib.Path) -> None:
        # tokenizer.json as it is: AutoTokenizer may put another decoder on it and mangle spaces.
        self._tokenizer = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
        template = (model_folder / "chat_template.jinja").read_text()
        self._template = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True).from_string(template)

    def encode(self, question: Question) -> list[int]:
        """Returns the token ids of a chat with this one user turn, open for the reply.

        SmolLM2's template puts a system message of its own before a chat that has none. It is
        longer than the question, so a given one is rendered and then cut off again.
        """
        system = {"role": "system", "content": ""}
        user = {"role": "user", "content": question.text}
        prefix = self._template.render(messages=[system], add_generation_prompt=False)
        text = self._template.render(messages=[system, user], add_generation_prompt=True)
        return self._tokenizer.encode(text.removeprefix(prefix), add_special_tokens=False).ids

    def decode(self, response_ids: Sequence[int]) -> str:
        """Returns the text of a response without its special tokens."""
        return self._tokenizer.decode(list(response_ids), skip_special_tokens=True)
