"""Checkpoints of other formats, made into a run: the verb `convert`."""

from lcray.checkpoints.convert.convert import Conversion as Conversion
from lcray.checkpoints.convert.convert import convert as convert
