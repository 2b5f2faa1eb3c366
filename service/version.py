"""The installed package's version."""

from importlib import metadata

VERSION = metadata.version("unperturb")
