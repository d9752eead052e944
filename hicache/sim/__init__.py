"""The second shell: the serving engine under a virtual clock, with modelled tiers, fed from a recorded trace.

    trace ──► packed columns ──► replay (instant) or serving (timed) ──► events ──► engine ──► actions
                                                     ▲                                           │
                                                     └──────── CopyDone, at once or when a ◄─────┘
                                                               modelled link has carried it

Nothing of the engine is written again here: what is kept, where, and what leaves first is decided by
``hicache.engine``. The replay core imports the standard library only; statistics and the exact LRU curve use numpy.
"""
