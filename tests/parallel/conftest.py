"""Settings of the tests of this folder."""

from __future__ import annotations

import hypothesis

# Examples are not timed: a busy machine is no wrong answer.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
