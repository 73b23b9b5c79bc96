"""How E, the average over a field, is evaluated fast.

`expectation` is E itself; `binding` fits a field to an array; `average`, `window` and `extremes` do the sums and the
maxima; `sharding` reaches over mapped axes; `sizes` compares sizes, which may be symbols; `arrays` lays arguments beside x;
`xla` holds what is said to the compiler.
"""
