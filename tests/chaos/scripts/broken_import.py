import there_is_no_such_package  # noqa: F401
