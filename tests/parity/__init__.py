"""Comparison with the reference implementations: what is compared, with which weights, and how.

`recipe` and `cases` need NumPy alone and are shared by the goldens and the live tests; `references`
needs torch and the library of the case.

    python -m tests.parity.make_goldens --microsoft DIR     rewrites tests/goldens
    pytest tests/parity --microsoft DIR                     compares live

DIR is a checkout of microsoft/Swin-Transformer; without it those cases are left out.
"""
