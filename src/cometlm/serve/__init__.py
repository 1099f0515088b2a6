"""A server that OpenAI clients talk to: conversations whose context never runs out.

From the bottom up: `engine` (one thread runs the model, jobs by turns), `transcript` (text out of
tokens), `answer` (what one request does), `trail`, `ids`, `objects`, `folder`, `index` and `kept`
(what is found again), then HTTP.
"""
