"""The engines behind one interface: ``unavailable``, ``reasons``, ``forward``, ``backward``, ``weights``.

One may also offer ``plain_head_dims``, for calls that need no look at anything else (:mod:`fastattn.plain`).
"""
