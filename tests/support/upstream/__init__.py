"""An OpenAI-compatible provider that can misbehave on request, for tests only.

`python -m tests.support.upstream --port 0 --ready-file PATH` serves it on loopback. The model id
chooses the behaviour: `mode` or `mode:value,name=value`. `modes.py` and `broken.py` list them.
"""
