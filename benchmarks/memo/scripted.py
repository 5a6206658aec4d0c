"""A real OpenAI-compatible server whose models are scripts: ``python -m benchmarks.memo.scripted --port 8000``.

Models: "executive", "memory" and "generator" know the invented world by rules. It can be told to misbehave::

    POST /faults {"model": "memory", "kind": "500", "times": 3, "skip": 0}

Kinds: an HTTP status ("429", "500", "401", ...); "broken_json", "refusal", "empty", "half", "hang", "garbage",
"tools", "too_long", "long", "no_usage", "plain", "die", or "text:WORDS" for a reply of WORDS. GET /log lists the
requests, POST /reset forgets them and the faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from benchmarks.memo import executive, generator
from benchmarks.memo.world import World
from mem_triton.systems.memo.reflections.prompts import TASKS

Reply = Callable[[list[dict[str, Any]], dict[str, Any]], str]


@dataclass
class Fault:
    """times: how often it happens; skip: how many requests pass before."""

    kind: str
    times: int = 1
    skip: int = 0


class Scripted:
    """The models, the faults that are due, and what was asked. structured: whether JSON schemas are taken."""

    def __init__(self, world: World, structured: bool = True, key: str = "", delay: float = 0.0) -> None:
        self.world, self.structured, self.key, self.delay = world, structured, key, delay
        self.models: dict[str, Reply] = {
            "memory": self._memory,
            "executive": self._executive,
            "generator": self._generator,
        }
        self.faults: dict[str, list[Fault]] = {}
        self.log: list[dict[str, Any]] = []
        self.running = self.most = self.left = 0

    def _memory(self, messages: list[dict[str, Any]], body: dict[str, Any]) -> str:
        said = messages[-1]["content"]
        question = said.rpartition("Question: ")[2] if "Question: " in said else said
        answer = self.world.recall(question)
        return json.dumps({"answer": answer, "reasoning": "learned"}) if "JSON object" in said else answer

    def _executive(self, messages: list[dict[str, Any]], body: dict[str, Any]) -> str:
        if (name := _schema(body)) == "probe":
            return '{"ok": true}'
        return executive.reply(messages, name or _by_words(messages))

    def _generator(self, messages: list[dict[str, Any]], body: dict[str, Any]) -> str:
        name = _schema(body)
        return '{"ok": true}' if name == "probe" else generator.reply(messages, name or _step(messages))

    def due(self, model: str) -> str | None:
        """The fault of the coming request, None for a right answer."""
        for fault in self.faults.get(model, []):
            if fault.skip > 0:
                fault.skip -= 1
                return None
            if fault.times > 0:
                fault.times -= 1
                return fault.kind
        return None

    def complete(self, body: dict[str, Any]) -> str:
        """What the model says."""
        return self.models[body["model"]](body["messages"], body)


def _schema(body: dict[str, Any]) -> str:
    return ((body.get("response_format") or {}).get("json_schema") or {}).get("name", "")


def _by_words(messages: list[dict[str, Any]]) -> str:
    """The schema that a prompt asks for in words alone."""
    words = {'"clues"': "grounding", '"confirmed"': "pinning", '"pivot"': "seeking", '"final_answer"': "synthesis"}
    task = messages[0]["content"]
    if found := next((name for word, name in words.items() if word in task), None):
        return found
    return "final_decision" if messages[1]["content"].endswith("Give the answer now.") else "decision"


def _step(messages: list[dict[str, Any]]) -> str:
    """The step of a build whose prompt asks for its shape in words alone."""
    return next(name for name, task in TASKS.items() if task == messages[0]["content"])


def _completion(body: dict[str, Any], text: str, usage: bool = True) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    prompt = sum(len(m["content"].split()) for m in body["messages"])
    said: dict[str, Any] = {"id": "scripted", "object": "chat.completion", "created": 0, "model": body["model"]}
    said["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
    if usage:
        spent = len(text.split())
        said["usage"] = {"prompt_tokens": prompt, "completion_tokens": spent, "total_tokens": prompt + spent}
    return said


def app_of(scripted: Scripted) -> FastAPI:
    """The server's application."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if (refused := _refused(request)) is not None:
            return refused
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in scripted.models]})

    @app.post("/faults")
    async def faults(request: Request) -> dict[str, int]:
        told = await request.json()
        scripted.faults.setdefault(told.pop("model"), []).append(Fault(**told))
        return {"ok": 1}

    @app.post("/reset")
    async def reset() -> dict[str, int]:
        scripted.faults.clear()
        scripted.log.clear()
        scripted.most = scripted.left = 0
        return {"ok": 1}

    @app.get("/log")
    async def log() -> dict[str, Any]:
        return {"requests": scripted.log, "most_at_once": scripted.most, "left": scripted.left, "now": scripted.running}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if (refused := _refused(request)) is not None:
            return refused
        body = await request.json()
        scripted.log.append(body)
        if body["model"] not in scripted.models:
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, status_code=404)
        if not scripted.structured and "response_format" in body:
            return JSONResponse({"error": {"message": "response_format is not supported"}}, status_code=400)
        scripted.running += 1
        scripted.most = max(scripted.most, scripted.running)
        try:
            if scripted.delay:
                await _wait(request, scripted.delay)
            return await _respond(request, body, scripted.due(body["model"]))
        finally:
            scripted.running -= 1

    async def _wait(request: Request, seconds: float) -> None:
        for _ in range(max(1, round(seconds / 0.02))):
            if await request.is_disconnected():
                scripted.left += 1
                return
            await asyncio.sleep(0.02)

    async def _respond(request: Request, body: dict[str, Any], kind: str | None) -> Response:
        if kind is None or kind == "no_usage":
            return JSONResponse(_completion(body, scripted.complete(body), usage=kind is None))
        if kind.isdigit():
            headers = {"Retry-After": "0.05"} if kind == "429" else {}
            return JSONResponse(
                {"error": {"message": f"told to answer {kind}"}}, status_code=int(kind), headers=headers
            )
        if kind.startswith("text:"):
            return JSONResponse(_completion(body, kind[5:]))
        if kind == "hang":
            await _wait(request, 600)
            return JSONResponse({})
        if kind == "die":
            os._exit(9)
        if kind == "half":
            whole = json.dumps(_completion(body, scripted.complete(body))).encode()

            async def parts() -> Any:
                yield whole[: len(whole) // 2]
                raise ConnectionAbortedError("told to break off")

            return StreamingResponse(parts(), media_type="application/json")
        if kind == "garbage":
            return Response(b"\xff\xfe<html>", media_type="application/json")
        if kind == "tools":
            said = _completion(body, "")
            said["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [{"id": "t"}]}
            return JSONResponse(said)
        if kind == "too_long":
            told = {"error": {"message": "This model's maximum context length is 2048 tokens."}}
            return JSONResponse(told, status_code=400)
        text = scripted.complete(body)
        texts = {
            "broken_json": text[: max(1, len(text) * 2 // 3)],
            "refusal": "I'm sorry, but I can't help with that.",
            "empty": "",
            "long": text + " and so on" * 200_000,
            "plain": "Here is what I think about it.",
        }
        return JSONResponse(_completion(body, texts[kind]))

    def _refused(request: Request) -> Response | None:
        if scripted.key and request.headers.get("authorization") != f"Bearer {scripted.key}":
            return JSONResponse({"error": {"message": "wrong key"}}, status_code=401)
        return None

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--companies", type=int, default=6)
    parser.add_argument("--no-schemas", action="store_true", help="refuse JSON schemas")
    parser.add_argument("--key", default="", help="the API key that requests must have")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds of each request")
    told = parser.parse_args()
    world = World(told.seed, told.people, told.companies)
    app = app_of(Scripted(world, not told.no_schemas, told.key, told.delay))
    uvicorn.run(app, host="127.0.0.1", port=told.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
