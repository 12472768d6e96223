from .reference import *  # noqa
