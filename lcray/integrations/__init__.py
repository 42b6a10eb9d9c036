"""Recording from other libraries' loops, and tasks from their files.

Each module imports its own library, so import the one that you use, such as
`lcray.integrations.transformers`.
"""
