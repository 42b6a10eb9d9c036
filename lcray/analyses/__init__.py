"""The findings: one module each, with one public function from an output's tables to a table.

`lcray.analyses.registry` lists them; `lcray.findings` computes, stores and returns them. Equations
and their sources are in the functions' docstrings.
"""
