"""What people write with the ``openai`` SDK, against one server: run in an environment that has it, not kvbaton.

``python openai_script.py URL``: one JSON object a call, ``{"call", "said"}`` or ``{"call", "error"}``. Answers do not
depend on the server, so that those of several can be compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import openai

PROMPT = "g6=V6QT; s9=GZTT;?s9="
OTHER = "a1=QX7B; b2=MM30;?a1="
TURN = {"role": "user", "content": PROMPT}
GREEDY: dict[str, Any] = {"model": "recall", "max_tokens": 5, "temperature": 0}
SAMPLED: dict[str, Any] = {"model": "recall", "max_tokens": 8, "temperature": 2.0, "seed": 7}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def calls(client: openai.OpenAI) -> dict[str, Callable[[], Any]]:
    complete, chat = client.completions.create, client.chat.completions.create

    def texts(**fields: Any) -> list[Any]:
        return [(choice.index, choice.text) for choice in complete(**{**GREEDY, "prompt": PROMPT, **fields}).choices]

    def streamed(**fields: Any) -> dict[int, str]:
        said: dict[int, str] = {}
        for event in complete(**{**GREEDY, "prompt": PROMPT, **fields}, stream=True):
            for choice in event.choices:
                said[choice.index] = said.get(choice.index, "") + choice.text
        return said

    def talk(**fields: Any) -> list[Any]:
        answer = chat(**{**GREEDY, "messages": [TURN], **fields})
        return [(choice.index, choice.message.content) for choice in answer.choices]

    def multi_turn() -> list[Any]:
        first = chat(**GREEDY, messages=[TURN]).choices[0].message
        return talk(messages=[TURN, first.model_dump(), TURN])

    def usage(**fields: Any) -> Any:
        return complete(**{**GREEDY, "prompt": [PROMPT, OTHER], **fields}).usage.model_dump(include=_COUNTED)

    def stream_usage() -> Any:
        options = {"include_usage": True}
        return [*chat(**GREEDY, messages=[TURN], stream=True, stream_options=options)][-1].usage.total_tokens

    def logprobs() -> Any:
        content = chat(**GREEDY, messages=[TURN], logprobs=True, top_logprobs=3).choices[0].logprobs.content
        return [(each.token, each.bytes, round(each.logprob, 3)) for each in content]

    def echoed(**fields: Any) -> Any:
        answer = complete(**{**GREEDY, "prompt": PROMPT, "echo": True, "logprobs": 2, **fields})
        return [
            (choice.logprobs.tokens, choice.logprobs.text_offset, rounded(choice.logprobs.token_logprobs))
            for choice in answer.choices
        ]

    def rounded(logprobs: list[float | None]) -> list[float | None]:
        return [each and round(each, 3) for each in logprobs]

    def prompt_logprobs() -> Any:
        (choice,) = complete(**{**GREEDY, "prompt": PROMPT}, extra_body={"prompt_logprobs": 1}).choices
        rows = [row or {} for row in choice.model_extra["prompt_logprobs"]]
        return [{token: (round(each["logprob"], 3), each["rank"]) for token, each in row.items()} for row in rows]

    def refused(**fields: Any) -> tuple[int, Any, Any]:
        try:
            complete(**{**GREEDY, "prompt": PROMPT, **fields})
        except openai.APIStatusError as error:
            return error.status_code, error.code, error.param
        raise AssertionError("it was not refused")

    neutral = {"response_format": {"type": "text"}, "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    return {
        "models": lambda: [model.id for model in client.models.list()],
        "model": lambda: client.models.retrieve("recall").id,
        "completion": texts,
        "completion stream": streamed,
        "prompts": lambda: texts(prompt=[PROMPT, OTHER]),
        "prompts stream": lambda: streamed(prompt=[PROMPT, OTHER]),
        "prompts as token ids": lambda: texts(prompt=[[1, 2, 3], [4, 5]]),
        "n": lambda: texts(**SAMPLED, n=3),
        "n of prompts": lambda: texts(**SAMPLED, prompt=[PROMPT, OTHER], n=2),
        "best_of": lambda: texts(**SAMPLED, best_of=3),
        "echo": lambda: texts(echo=True),
        "echo with logprobs": lambda: echoed(prompt=[PROMPT, OTHER], max_tokens=2),
        "echo alone": lambda: echoed(max_tokens=0),
        "prompt_logprobs": prompt_logprobs,
        "seed": lambda: texts(**SAMPLED),
        "frequency_penalty": lambda: texts(**SAMPLED, frequency_penalty=1.5),
        "presence_penalty": lambda: texts(**SAMPLED, presence_penalty=1.5),
        "logit_bias": lambda: texts(logit_bias={"9": 100}),
        "stop": lambda: texts(stop=["T"]),
        "top_k": lambda: texts(**SAMPLED, extra_body={"top_k": 2}),
        "min_p": lambda: texts(**SAMPLED, extra_body={"min_p": 0.2}),
        "repetition_penalty": lambda: texts(**SAMPLED, extra_body={"repetition_penalty": 1.3}),
        "min_tokens": lambda: texts(extra_body={"min_tokens": 5, "skip_special_tokens": False}),
        "stop_token_ids": lambda: texts(extra_body={"stop_token_ids": [9, 10], "ignore_eos": True}),
        "include_stop_str_in_output": lambda: texts(stop=["T"], extra_body={"include_stop_str_in_output": True}),
        "usage of prompts": usage,
        "chat": talk,
        "chat neutral": lambda: talk(**neutral, tool_choice="none", parallel_tool_calls=True, reasoning_effort="low"),
        "chat tools": lambda: talk(tools=[TOOL]),
        "chat template": lambda: talk(extra_body={"chat_template_kwargs": {"enable_thinking": False}}),
        "chat multi-turn": multi_turn,
        "chat usage in a stream": stream_usage,
        "chat logprobs": logprobs,
        "refused: model": lambda: refused(model="other"),
        "refused: too long": lambda: refused(prompt=[1] * 100_000),
        "refused: grammar": lambda: refused(extra_body={"guided_regex": "a*"}),
        "unknown field": lambda: texts(extra_body={"surprise": 1}),
    }


_COUNTED = {"prompt_tokens", "completion_tokens", "total_tokens"}


def main(url: str, key: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    for name, call in calls(client).items():
        try:
            row = {"call": name, "said": call()}
        except (openai.OpenAIError, AssertionError, TypeError, AttributeError) as error:
            row = {"call": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "none-is-needed")
