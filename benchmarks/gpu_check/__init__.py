"""Everything that needs a GPU, in three calls: ``python -m benchmarks.gpu_check``.

``stages.py`` lists what is run, ``runner.py`` runs it: every stage in a process group of its own
and within its own limit, the record rewritten after each. ``worker.py`` is the inside of a stage;
``probe.py``, ``build.py``, ``warm.py``, ``smoke.py``, ``timing.py``, ``sweep.py``,
``counters.py``, ``linear.py``, ``comparison.py`` and ``training.py`` are what it may do.
``table.py`` prints.

In a rehearsal ``target.py`` puts the CPU's backends in the place of the GPU's, and
``rehearsal.py`` stand-ins in the place of tools that are not there.
"""
