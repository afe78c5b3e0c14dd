"""kvbaton under SGLang: a transfer backend, found by SGLang's own plug-in mechanism.

``python -m sglang.launch_server … --disaggregation-mode prefill --disaggregation-transfer-backend kvbaton``

- :mod:`kvbaton.engines.sglang.plugin`: what SGLang loads: the backend's name, and its classes behind it
- :mod:`kvbaton.engines.sglang.backend`: those classes; nothing but SGLang's calls to ours and back
- :mod:`kvbaton.engines.sglang.bootstrap`: SGLang's bootstrap server behind the shared secret, and its client
- :mod:`kvbaton.engines.sglang.sending`, :mod:`kvbaton.engines.sglang.receiving`: one request on either side
- :mod:`kvbaton.engines.sglang.memory`: SGLang's buffers as a layout; its page lists as spans
- :mod:`kvbaton.engines.sglang.options`: the environment variable ``KVBATON_SGLANG``
- :mod:`kvbaton.engines.sglang.versions`: which SGLang this was written for

Only ``plugin``, ``backend`` and ``bootstrap`` import SGLang. The plug-in is loaded in every process of SGLang: what
costs is imported when the backend has been chosen.
"""
