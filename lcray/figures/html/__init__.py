"""The report: an output, or several side by side, as one HTML page that needs nothing else.

`building` has the verb. It reads the tables (`source`), makes sections of them (`totals`, `layers`,
`time`, `elements`, `together`, `windows`; for several outputs `sides`), and puts these into the
page (`page`), whose numbers are packed in `store`.
"""
