"""The engines behind one interface: ``unavailable``, ``reasons``, ``forward``, ``backward``, ``weights``."""
