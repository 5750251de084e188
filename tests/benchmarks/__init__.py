"""What things cost, measured on the machine at hand; each module is a command: `python -m tests.benchmarks.NAME`.

A benchmark starts real servers on the loopback interface, is bounded in time and in count, compares contenders
within one run only, prints a Markdown table and writes nothing unless it is told where. Nothing in here is
imported by the package or by another test than `tests/test_benchmarks.py`, which runs each with tiny numbers.
"""
