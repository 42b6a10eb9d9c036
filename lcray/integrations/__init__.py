"""Recording in other libraries' training loops, and tasks from their files.

Each module imports its own library, so import only the module that you use, such as
`lcray.integrations.transformers`.
"""
