from tests.ranks import ranks

__all__ = ["ranks"]
