"""How the equation of `theory.py` is evaluated.

`evaluate` lays the operands beside x and picks the plain form, the rule or a kernel; `derivative` is the rule, which
saves memory, and `tangents` its forms.
"""
