"""The report: one output, or several side by side, as one HTML page without other files.

`report` has the verb. It reads the tables (`source`), makes sections from them (`totals`, `layers`,
`along_the_run`, `shares`, `elements`, `synchrony`, `windows`; for several outputs `comparison`),
and puts these into the page (`page`), whose numbers are packed in `store`.
"""
