"""The steps of the small world on disk, with a model that has learnt nothing."""

from __future__ import annotations

import json

import pytest

from prefopt.data.formats import read_examples  # adjusted below if the name differs
