"""The engines behind one interface: ``unavailable``, ``reasons``, ``forward``, ``backward``, ``weights``.

One may also offer ``takes_as_they_are``, for calls that need no look at anything else (:mod:`fastattn.plain`).
"""
