"""The type checker that ``BEARTYPE=1`` turns on: beartype, for which an int is a float, as annotations have it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
