"""The formulations that the papers' code executes, written plainly: what ours are compared with, in value and in time.

``released.<name>`` of a mixer, gate or cross attention has a function ``released(module)`` that returns a function of
the module's input (and, for cross attention, of queries and tokens), with the module's own parameters and the steps
of the released code: the tensors it materialises, in its order. Where a name exists as several kinds the function is
called ``released_<kind>``.
"""
