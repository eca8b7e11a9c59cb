"""Imported last by the fork server: no collection of garbage visits what was imported before.

DeepSpeed collects garbage several times a start. In a forked rank each collection would visit, and so copy, the objects
of all libraries.
"""

import gc

gc.collect()
gc.freeze()
