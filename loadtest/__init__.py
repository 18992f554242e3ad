"""Load tests that see what a user sees: HTTP. Nothing here imports another package of Penumbra.

`python -m loadtest SCENARIO --url URL` runs one against any OpenAI-compatible server; `penumbra loadtest` starts a
cluster for it first. Importing this package loads no Locust: that patches the process, and belongs to `__main__`.
"""
