"""(stub until the loader is merged)"""


def build(part, key, *positional):
    raise NotImplementedError
