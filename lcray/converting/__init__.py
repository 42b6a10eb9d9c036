"""Checkpoints of other formats, made into a run: the verb `convert`."""

from lcray.converting.verb import Conversion as Conversion
from lcray.converting.verb import convert as convert
