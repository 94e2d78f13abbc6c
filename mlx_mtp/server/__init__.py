"""An OpenAI-compatible server on one machine: `mlx-mtp serve`. Needs the extra `server` (starlette, uvicorn).

A request goes through guards.py (who may ask), body.py (bytes -> JSON), asks.py (JSON -> a checked ask), answering.py
(the engine's handles, until they end or nobody listens any more), replies.py or events.py (what is sent back).
"""
