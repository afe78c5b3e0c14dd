"""What people write with LangChain and LiteLLM, against one server: run in an environment that has them, not kvbaton.

``python chains_script.py URL``: one JSON object a call, as ``openai_script.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import litellm
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

PROMPT = "g6=V6QT; s9=GZTT;?s9="
OTHER = "a1=QX7B; b2=MM30;?a1="
TURN = {"role": "user", "content": PROMPT}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def calls(url: str, key: str) -> dict[str, Callable[[], Any]]:
    shared: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": key, "model": "recall", "temperature": 0}
    chat = ChatOpenAI(**shared, max_tokens=5)
    text = OpenAI(**shared, max_tokens=5)
    lite: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": key, "max_tokens": 5, "temperature": 0}

    def logprobs() -> Any:
        told = chat.bind(logprobs=True, top_logprobs=2).invoke(PROMPT).response_metadata["logprobs"]["content"]
        return [(each["token"], round(each["logprob"], 3)) for each in told]

    def lite_stream() -> str:
        parts = litellm.completion(model="openai/recall", messages=[TURN], stream=True, **lite)
        return "".join(part.choices[0].delta.content or "" for part in parts)

    return {
        "langchain chat": lambda: chat.invoke(PROMPT).content,
        "langchain turns": lambda: (
            chat.invoke([SystemMessage("s"), HumanMessage(PROMPT), AIMessage("GZTT"), HumanMessage(PROMPT)]).content
        ),
        "langchain stream": lambda: "".join(str(part.content) for part in chat.stream(PROMPT)),
        "langchain batch": lambda: [answer.content for answer in chat.batch([PROMPT, OTHER])],
        "langchain tools": lambda: chat.bind_tools([TOOL]).invoke(PROMPT).content,
        "langchain usage": lambda: chat.invoke(PROMPT).usage_metadata["total_tokens"],
        "langchain logprobs": logprobs,
        "langchain text": lambda: text.invoke(PROMPT),
        "langchain texts": lambda: [each[0].text for each in text.generate([PROMPT, OTHER]).generations],
        "litellm chat": lambda: (
            litellm.completion(model="openai/recall", messages=[TURN], **lite).choices[0].message.content
        ),
        "litellm stream": lite_stream,
        "litellm text": lambda: (
            litellm.text_completion(model="text-completion-openai/recall", prompt=PROMPT, **lite).choices[0].text
        ),
    }


def main(url: str, key: str) -> None:
    for name, call in calls(url, key).items():
        try:
            row = {"call": name, "said": call()}
        except Exception as error:  # noqa: BLE001 - each library has its own
            row = {"call": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "none-is-needed")
