"""A quarter of an hour with a GPU -> what can be learned in it, each number on disk as soon as it is there: `make gpu`.

steps.py      what is done, in which order, with which share of the time      folder.py   the files that are left
conduct.py    every step in a process of its own, ended at its limit           step.py     what such a process does
machine.py    versions, doctor      correct.py   12 cells against float64      suite.py    the tests that need a GPU
tuning.py     two classes tuned     speed.py     against rivals, cell by cell  model.py    a training step of ViT-B/16
profiling.py  the slowest two       report.py    the folder -> a page that holds it against the bars (bars.py)
place.py      the GPU, or a driver that runs nothing where there is none       cache.py    compiled kernels to carry
"""
