from functools import partial

from nanophi import schedule

wsd = partial(schedule, "wsd")
